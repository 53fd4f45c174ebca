"""Runs models, plain and quantized, in ComfyUI's dynamic patcher, a toy being its paging library; prints JSON.

python tests/nodes/paged.py [FORM ...]

The toy (see `Pages`) hands out memory of the fake accelerator, all of what is asked for or nothing: weights then stay
on the device, or are sent there at each use. The native library runs on NVIDIA's only.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import two_devices  # noqa: E402
from fake_accelerator import DEVICE, moved  # noqa: E402
from inside import load_pack  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from tests.nodes import test_packed  # noqa: E402
from zimage_core.weights.snapshot import Snapshot  # noqa: E402

room = True  # for weights to stay on the device


class Pages:
    """Memory of one model; a page is (its memory, a number, its bytes), as the library has it."""

    def __init__(self, _size: int, _device: Any):
        self.pages: list[tuple[torch.Tensor, int, int]] = []

    def alloc(self, size: int) -> tuple[torch.Tensor, int, int]:
        self.pages.append((torch.empty(size, dtype=torch.uint8, device=DEVICE), len(self.pages) + 1, size))
        return self.pages[-1]

    def loaded_size(self) -> int:
        return sum(size for *_, size in self.pages) if room else 0

    def free_memory(self, _size: int) -> int:
        return 0

    def prioritize(self) -> None:
        pass


class Mapped:
    """A file that ComfyUI maps, whose handle is a file descriptor."""

    def __init__(self, path: str):
        self.file = open(path, "rb")  # noqa: SIM115 open as long as it is mapped
        self.map = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY)

    def get(self) -> int:
        return ctypes.addressof(ctypes.c_uint8.from_buffer(self.map))

    def get_file_handle(self) -> int:
        return self.file.fileno()

    def bounce(self) -> bool:
        return True


read = {"from files": 0, "through memory": 0}  # weights that ComfyUI has sent, and from where


def from_file(tensor: torch.Tensor, *_destinations: Any, **_settings: Any) -> bool:
    """Whether ComfyUI can read a weight from its file, past the process's memory; here it is sent all the same."""
    part = getattr(tensor, "_qdata", tensor)
    place = getattr(part.untyped_storage(), "_comfy_tensor_file_slice", None)
    if place is not None:
        raw = os.pread(place.file_ref, place.size, place.offset)
        assert raw == part.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    read["through memory" if place is None else "from files"] += 1
    return False


class NoPinnedMemory:
    size = 0

    def __init__(self, *_: Any):
        pass


def page() -> None:
    """Puts the toy in place of the library, and ComfyUI into the state in which it pages."""
    import comfy.memory_management
    import comfy.model_patcher
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_mmap
    import comfy_aimdo.model_vbar as library
    import comfy_aimdo.torch
    from comfy.cli_args import args

    args.disable_pinned_memory = True
    comfy.memory_management.aimdo_enabled = True
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy_aimdo.host_buffer.HostBuffer = NoPinnedMemory
    comfy_aimdo.torch.aimdo_to_tensor = lambda page, _device: page[0]
    listed = comfy.model_patcher.ModelPatcher._load_list

    def load_list(self, for_dynamic=False, default_device=None):
        for module in self.model.modules() if default_device == DEVICE else ():
            own = module._parameters
            if own and any(module.children()):  # ComfyUI gives these other data, which torch forbids to this device
                own.update({name: torch.nn.Parameter(own[name].to(DEVICE), requires_grad=False) for name in own})
        return listed(self, for_dynamic, None)

    comfy.model_patcher.ModelPatcher._load_list = load_list
    comfy_aimdo.model_mmap.ModelMMAP = Mapped
    comfy.memory_management.read_tensor_file_slice_into = from_file
    library.ModelVBAR = Pages
    library.vbar_fault = lambda page: page[1] if room else None
    library.vbar_unpin = lambda _page: None
    library.vbar_signature_compare = lambda ours, theirs: ours is not None and ours == theirs


def main(*forms: str) -> dict[str, Any]:
    global room
    pack = load_pack("use_pytorch_cross_attention")
    import comfy.model_management as mm

    folder = Path(tempfile.mkdtemp())
    files = {form: test_packed.file_of(folder, form) for form in forms if form != "plain"}
    files["plain"] = folder / "plain.safetensors"
    save_file(
        Snapshot(test_packed.NANO).transformer(dtype=torch.float32).state_dict(), files["plain"], test_packed.CONFIGS
    )
    files["encoder"] = test_packed.encoder_of(folder, "gguf")
    report: dict[str, Any] = {}
    with torch.inference_mode():
        expected = {form: results(pack, mm, files[form]) for form in forms}
        encoded, _ = features(pack, mm, files["encoder"])
        two_devices.take_over(mm)
        page()
        for form in forms:
            for room in (True, False):
                read.update(dict.fromkeys(read, 0))
                found = results(pack, mm, files[form])
                differences = [two_devices.relative(*pair) for pair in zip(found[0], expected[form][0], strict=True)]
                report[f"{form}, {'resident' if room else 'sent'}"] = {"differences": differences, **read, **found[1]}
        found, dynamic = features(pack, mm, files["encoder"])
        report["encoder"] = {"difference": two_devices.relative(found, encoded), "dynamic": dynamic}
    return report


def results(pack, mm, path: Path) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """(predictions as the file is, with a change on top, and without it again; how the weights are kept)."""
    patcher = pack.bridge.model.load_model(path, torch.float32 if path.stem == "plain" else None)
    changed = patcher.clone()
    generator = torch.Generator().manual_seed(0)
    change = 0.1 * torch.randn(512, 192, generator=generator)
    changed.add_patches({"diffusion_model.layers.1.feed_forward.w1.weight": (change,)})
    out = []
    for model in (patcher, changed, patcher):
        mm.load_models_gpu([model])
        out.append(predict(model))
    before = moved["to device"]
    predict(model)
    kinds = {"dynamic": patcher.is_dynamic(), "without paging": type(patcher.clone(disable_dynamic=True)).__name__}
    kept = {"paged": patcher.loaded_size(), "moved": moved["to device"] - before, "size": patcher.model_size()}
    mm.unload_all_models()
    return out, {**kinds, **kept}


def predict(patcher) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, context = torch.randn(1, 16, 8, 8, generator=generator), torch.randn(1, 21, 128, generator=generator)
    device = patcher.load_device
    return patcher.model.apply_model(
        latents.to(device),
        torch.tensor([0.7]).to(device),
        c_crossattn=context.to(device),
        num_tokens=21,
        transformer_options={},
    ).to("cpu")


def features(pack, mm, path: Path) -> tuple[torch.Tensor, bool]:
    clip = pack.bridge.clip.load_clip(path)
    mm.load_models_gpu([clip.patcher])
    ids = torch.tensor([[5, 0, 17, 639, 3]]).to(clip.patcher.load_device)
    return clip.cond_stage_model.encoder(ids, dtype=torch.float32).to("cpu"), clip.patcher.is_dynamic()


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
