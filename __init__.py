"""ComfyUI reads this file; everything is imported inside, so that tools which import the folder without ComfyUI can."""

WEB_DIRECTORY = "./web"  # ComfyUI serves it; the help of a node is web/docs/<node id>/<language>.md


async def comfy_entrypoint() -> object:
    from .nodes import ZImageExtension

    return ZImageExtension()
