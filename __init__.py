"""ComfyUI reads this file; everything is imported inside, so that tools which import the folder without ComfyUI can."""


async def comfy_entrypoint() -> object:
    from .nodes import ZImageExtension

    return ZImageExtension()
