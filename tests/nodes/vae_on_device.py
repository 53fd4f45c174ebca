"""Decodes and encodes on a fake accelerator with much and little memory; prints what it saw as JSON.

python tests/nodes/vae_on_device.py
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path[:0] = [str(Path(__file__).parent)]
import fake_accelerator  # noqa: E402
import two_devices  # noqa: E402
from fake_accelerator import live, peak, reset_peak, waits  # noqa: E402
from inside import load_pack  # noqa: E402

NANO = two_devices.NANO
BAND = 2**16  # bytes of the widest
LATENTS = torch.randn(1, 16, 12, 10, generator=torch.Generator().manual_seed(0))


def main() -> dict[str, Any]:
    pack = load_pack("use_pytorch_cross_attention")
    import comfy.model_management as mm
    import comfy.sd

    with torch.inference_mode():
        reference = pack.bridge.vae.ZImageVAE(NANO)
        image = reference.decode(LATENTS)
        latents = reference.encode(image)
        two_devices.take_over(mm)
        with patch("comfy.sd.VAE.throw_exception_if_invalid"), patch.object(mm, "vae_dtype", lambda *_: torch.float32):
            native = comfy.sd.VAE(sd={})
        report: dict[str, Any] = {
            "figures": [
                native.memory_used_decode(LATENTS.shape, torch.float32),
                native.memory_used_encode(image.movedim(-1, 1).shape, torch.float32),
            ]
        }
        seen = Seen(pack, mm, image, latents)
        need = pack.bridge.vae.vae_bands.plain_bytes(reference.first_stage_model, 96, 80, torch.float32)
        report["room"] = seen.run()
        report["on, room"] = seen.run(low_memory="on")
        report["little"] = seen.run(free=seen.weights + need * 0.5)
        report["enough"] = seen.run(free=seen.weights + need * 1.1)
        report["room after eviction"] = seen.run(free=seen.weights + need * 0.5, beside=True)
        report["pages that can be given back"] = seen.run(free=seen.weights + need * 0.5, pages=need)
        report["batch"] = seen.run(batch=3)
        capacity = [int(0.75 * size) for size in report["room"]["peaks"]]
        report["out of memory"] = seen.run(capacity=capacity)
        report["batch out of memory"] = seen.run(capacity=capacity, batch=2)
        report["off, out of memory"] = seen.run(capacity=capacity, low_memory="off")
        report["few weights"] = seen.run(low_memory="on", budget=0)
        for name, function in (("split", "normal_attention"), ("slices", "pytorch_attention")):
            report[f"{name} attention"] = attention(seen, mm, function)
    return report


class Seen:
    """What one decode and one encode did, beside the CPU's results."""

    def __init__(self, pack: Any, mm: Any, image: torch.Tensor, latents: torch.Tensor):
        self.pack, self.mm, self.image, self.latents = pack, mm, image, latents
        self.weights = pack.bridge.vae.ZImageVAE(NANO).patcher.model_size()

    def run(
        self,
        free: float = two_devices.PLENTY,
        pages: float = 0,
        capacity: list[int] | None = None,
        batch: int = 1,
        low_memory: str = "auto",
        beside: bool = False,
        budget: int | None = None,
    ) -> dict[str, Any]:
        """free: bytes on the device, beside: more by what a loaded transformer takes; pages: what could be given back.

        capacity: bytes that there really are beside the weights, to decode and to encode; budget: for the weights.
        """
        mm, pack = self.mm, self.pack
        mm.unload_all_models()
        gc.collect()
        two_devices.free_on_device = int(free)
        vae = pack.bridge.vae.ZImageVAE(NANO)
        if pages:
            real = vae.patcher.get_free_memory
            vae.patcher.get_free_memory = lambda device: real(device) + int(pages)
        found: dict[str, Any] = {"asked": [], "in bands": [], "tiles": 0, "peaks": [], "before": live()}
        if beside:
            model = pack.bridge.model.load_model(NANO, torch.float32)
            two_devices.free_on_device += model.model_size()
            mm.load_models_gpu([model])
            found["before"] = model.loaded_size()
        vae.first_stage_model.low_memory = low_memory
        with self.watched(vae, found, budget):
            results = []
            for index, (call, x) in enumerate(((vae.decode, LATENTS), (vae.encode, self.image))):
                reset_peak()
                fake_accelerator.capacity = None if capacity is None else self.weights + capacity[index]
                results.append(call(torch.cat([x] * batch)))
                fake_accelerator.capacity = None
                found["peaks"].append(peak() - self.weights)
        found["loaded"] = vae.patcher.loaded_size() / self.weights
        if beside:
            found["left"] = model.loaded_size()
        found["differences"] = [
            max((one - expected[0]).abs().max().item() for one in result)
            for result, expected in zip(results, (self.image, self.latents), strict=True)
        ]
        return found

    @contextmanager
    def watched(self, vae: Any, found: dict[str, Any], budget: int | None) -> Iterator[None]:
        bands, load = self.pack.bridge.vae.vae_bands, self.mm.load_models_gpu

        def counted(name: str) -> Any:
            real = getattr(bands, name)

            def run(module: Any, x: torch.Tensor, rows: int | None, **settings: Any) -> torch.Tensor:
                found["in bands"].append(name)
                before = sum(waits.values())
                out = real(module, x, rows, **settings)
                found["waits"] = found.get("waits", 0) + sum(waits.values()) - before
                return out

            return run

        def noted(models: Any, memory_required: float = 0, **settings: Any) -> Any:
            found["asked"].append(memory_required)
            if budget is not None:
                two_devices.free_on_device = budget
                memory_required = 0
            return load(models, memory_required=memory_required, **settings)

        def tiles(name: str) -> Any:
            real = getattr(vae, name)

            def run(*arguments: Any, **_settings: Any) -> torch.Tensor:
                found["tiles"] += 1
                fake_accelerator.capacity = None
                return real(*arguments)

            return run

        vae.decode_tiled_, vae.encode_tiled_ = tiles("decode_tiled_"), tiles("encode_tiled_")
        with (
            patch.multiple(bands, decode=counted("decode"), encode=counted("encode"), WORKSPACE=BAND),
            patch.object(self.mm, "load_models_gpu", noted),
        ):
            yield


def attention(seen: Seen, mm: Any, function: str) -> dict[str, Any]:
    """As where ComfyUI avoids torch's attention for its VAE, or where that runs out of memory."""
    import comfy.ops

    calls = {"torch": 0, "slices": 0}
    torchs, model = (
        torch.nn.functional.scaled_dot_product_attention,
        sys.modules["comfy.ldm.modules.diffusionmodules.model"],
    )

    def counted(*arguments: Any, **settings: Any) -> torch.Tensor:
        calls["torch"] += 1
        return torchs(*arguments, **settings)

    def refused(*arguments: Any, **settings: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room for the scores")

    slices = model.slice_attention

    def in_slices(*arguments: Any) -> torch.Tensor:
        calls["slices"] += 1
        return slices(*arguments)

    with (
        patch.object(mm, "pytorch_attention_enabled_vae", lambda: function == "pytorch_attention"),
        patch.object(torch.nn.functional, "scaled_dot_product_attention", counted),
        patch.object(comfy.ops, "scaled_dot_product_attention", refused),
        patch.object(model, "slice_attention", in_slices),
    ):
        return {"plain": seen.run(), "bands": seen.run(low_memory="on"), **calls}


if __name__ == "__main__":
    print(json.dumps(main()))
