"""ComfyUI with this pack, to open in a browser; what is saved there stays in `.comfyui/`. Ctrl-C ends it."""

from __future__ import annotations

import argparse
import signal
import sys
import threading

import provision
from host import HostError, Server
from provision import ROOT, SetupError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8188)
    args, more = parser.parse_known_args()  # the rest is ComfyUI's
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    base = ROOT / ".comfyui"
    try:
        server = Server(provision.newest(), packs={"comfyui-zimage": ROOT}, base=base, port=args.port, args=more)
        print(f"ComfyUI {provision.release(server.comfyui)} is starting; its log is {server.log.relative_to(ROOT)}")
        with server:
            print(f"Open {server.url} ; models go to {(base / 'models').relative_to(ROOT)}; Ctrl-C ends it", flush=True)
            while True:
                server.check_alive()
                threading.Event().wait(1)
    except (HostError, SetupError, OSError) as error:
        print(f"serve: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nComfyUI is stopped")
        return 0


if __name__ == "__main__":
    sys.exit(main())
