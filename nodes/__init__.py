"""The nodes of this pack."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .conditioning import ZImageTextEncode
from .control import ZImageControlNet
from .inpaint import ZImageInpaintFinish, ZImageInpaintPrepare
from .loaders import ZImageTextEncoderLoader, ZImageTransformerLoader, ZImageVAELoader
from .lora import ZImageLoraLoader
from .sampling import ZImageSampler
from .vae import ZImageVAEDecode, ZImageVAEEncode


class ZImageExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            ZImageTransformerLoader,
            ZImageTextEncoderLoader,
            ZImageVAELoader,
            ZImageLoraLoader,
            ZImageControlNet,
            ZImageTextEncode,
            ZImageSampler,
            ZImageVAEDecode,
            ZImageVAEEncode,
            ZImageInpaintPrepare,
            ZImageInpaintFinish,
        ]
