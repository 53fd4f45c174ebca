"""What each workflow is called, what its note says, which files it links to, and what its card shows."""

from __future__ import annotations

from typing import Any

TURBO = "https://huggingface.co/Comfy-Org/z_image_turbo/resolve/main/split_files"
BASE = "https://huggingface.co/Comfy-Org/z_image/resolve/main/split_files"
UNION = "https://huggingface.co/alibaba-pai/Z-Image-Turbo-Fun-Controlnet-Union-2.1/resolve/main"
PIXEL_ART = "https://huggingface.co/tarn59/pixel_art_style_lora_z_image_turbo/resolve/main"
# file that ComfyUI's own templates load -> (address, folder under models/, GB where known)
FILES = {
    "z_image_turbo_bf16.safetensors": (TURBO, "diffusion_models", "12.3 GB"),
    "z_image_bf16.safetensors": (BASE, "diffusion_models", "12.3 GB"),
    "z_image_turbo_int8_convrot.safetensors": (TURBO, "diffusion_models", ""),
    "z_image_int8_convrot.safetensors": (BASE, "diffusion_models", ""),
    "qwen_3_4b.safetensors": (TURBO, "text_encoders", "8.0 GB"),
    "qwen_3_4b_fp8_mixed.safetensors": (TURBO, "text_encoders", ""),
    "ae.safetensors": (TURBO, "vae", "0.3 GB"),
    "pixel_art_style_z_image_turbo.safetensors": (PIXEL_ART, "loras", ""),
    "Z-Image-Turbo-Fun-Controlnet-Union-2.1-8steps.safetensors": (UNION, "model_patches", "6.7 GB"),
}

# API prompt -> name of the workflow, which its card shows; hello comes first where names are sorted
TITLES = {
    "zimage_nano_txt2img": "Hello world (Z-Image Nano)",
    "zimage_nano_img2img": "Image to image (Z-Image Nano)",
    "zimage_nano_lora": "LoRA (Z-Image Nano)",
    "zimage_nano_control": "Outlines with ControlNet (Z-Image Nano)",
    "zimage_nano_inpaint": "Inpaint (Z-Image Nano)",
    "zimage_nano_outpaint": "Outpaint (Z-Image Nano)",
    "zimage_turbo_single_files": "Z-Image Turbo",
    "zimage_turbo_int8": "Z-Image Turbo (int8)",
    "zimage_turbo_gguf": "Z-Image Turbo (GGUF)",
    "zimage_turbo_lora": "Z-Image Turbo (LoRA)",
    "zimage_turbo_txt2img": "Z-Image Turbo (snapshot)",
    "zimage_turbo_control": "Outlines with ControlNet (Z-Image Turbo)",
    "zimage_turbo_inpaint": "Inpaint (Z-Image Turbo)",
    "zimage_base_single_files": "Z-Image Base",
    "zimage_base_int8": "Z-Image Base (int8)",
    "zimage_base_txt2img": "Z-Image Base (snapshot)",
    "zimage_base_img2img": "Image to image (Z-Image Base)",
}

TURBO_ADVICE = "8 steps, guidance 0 (CFG 1 in a KSampler). Sizes divisible by 16, around 1024x1024."
BASE_ADVICE = "28 to 50 steps, guidance 3 to 5 (CFG 4 to 6 in a KSampler), with a negative prompt."
SNAPSHOT = (
    "Switch **download** on in the three loaders (33 GB), or put the snapshot of **Tongyi-MAI/{0}** into "
    "models/zimage/Tongyi-MAI--{0}.\n\n{1}"
)
STANDARD = "ComfyUI's own three files:\n\n{files}\n\n{advice}"
SMALL = "Smaller files than those in bfloat16:\n\n{files}\n\n{advice}"
# API prompt -> (title of the note, text of the note)
NOTES = {
    "zimage_nano_txt2img": (
        "Press Run",
        "**Z-Image Nano** ships with the pack: press *Run*.\n\n"
        "It knows 12 colors, 8 shapes (circle, square, triangle, diamond, star, cross, ring, heart), positions, "
        "sizes, *two* or *three* of a thing, and colored backgrounds. It was trained at 128x128: other sizes come out "
        "worse the further they are from it.",
    ),
    "zimage_nano_img2img": (
        "How much changes",
        "The second prompt changes the first image. **denoise** says how much: near 0.4 keeps the image, "
        "0.8 follows the new prompt, 1 forgets the image.",
    ),
    "zimage_nano_lora": (
        "With and without",
        "A LoRA teaches **Z-Image Nano** the moon. Set strength to 0 to see what it does without.\n\n"
        "The report says what was matched; with several LoRA it also says how much they overlap.",
    ),
    "zimage_nano_control": (
        "What to change",
        "The second image has the outlines of the first; its prompt says what is left open. **strength** says how much "
        "the outlines count; near 1 a prompt that names a shape wins. *Canny* sees brightness only: not red on blue.",
    ),
    "zimage_nano_inpaint": (
        "What to change",
        "Only what the mask covers is painted anew: 80x80 pixels around the circle. The second prompt describes the "
        "whole image. **feather** blends the edge; **denoise** below 1 keeps some of what was there.",
    ),
    "zimage_nano_outpaint": (
        "What to change",
        "**right** adds 64 pixels; **left**, **top** and **bottom** do so at the other sides. The second prompt "
        "describes the whole image. With a mask, a part of it is repainted as well.",
    ),
    "zimage_turbo_control": (
        "Get the files",
        "The image gets the outlines of yours; for depth or a pose, put a node that makes such a map in the place of "
        "*Canny*. **strength** 0.65 to 1, with a detailed prompt.\n\n{files}\n\n" + TURBO_ADVICE,
    ),
    "zimage_turbo_inpaint": (
        "Get the files",
        "Right-click your image, *Open in MaskEditor*, paint over what is to change. The prompt describes what is to "
        "be there.\n\n{files}",
    ),
    "zimage_base_img2img": (
        "Get the files",
        "**denoise** says how much changes: 0.3 a little, 0.7 a lot, 1 all. The image should have about a megapixel "
        "and sides divisible by 16.\n\n{files}\n\n" + BASE_ADVICE,
    ),
    "zimage_turbo_txt2img": ("Get the snapshot", SNAPSHOT.format("Z-Image-Turbo", TURBO_ADVICE)),
    "zimage_base_txt2img": ("Get the snapshot", SNAPSHOT.format("Z-Image", BASE_ADVICE)),
    "zimage_turbo_single_files": ("Get the files", STANDARD.replace("{advice}", TURBO_ADVICE)),
    "zimage_base_single_files": ("Get the files", STANDARD.replace("{advice}", BASE_ADVICE)),
    "zimage_turbo_int8": ("Get the files", SMALL.replace("{advice}", TURBO_ADVICE)),
    "zimage_base_int8": ("Get the files", SMALL.replace("{advice}", BASE_ADVICE)),
    "zimage_turbo_lora": (
        "Choose your LoRA",
        "Put any LoRA for Z-Image Turbo into models/loras, press R, and choose it in **Load Z-Image LoRA**. The report "
        "says what was matched. This one draws pixel art:\n\n{files}",
    ),
    "zimage_turbo_gguf": (
        "Get the files",
        "GGUF files stay quantized in memory. The transformer goes into models/diffusion_models, the Qwen3-4B into "
        "models/text_encoders.\n\n{files}\n\n" + TURBO_ADVICE,
    ),
}

# API prompt -> what the nano model draws for its card; those of the nano model show their own image
CARDS = {
    "zimage_turbo_txt2img": "a red star on a white background",
    "zimage_turbo_single_files": "a yellow star on a blue background",
    "zimage_turbo_int8": "a green star on a yellow background",
    "zimage_turbo_gguf": "a white star on a red background",
    "zimage_turbo_lora": "a yellow heart on a blue background",
    "zimage_turbo_control": "two yellow stars on a blue background",
    "zimage_turbo_inpaint": "a yellow heart on a red background",
    "zimage_base_img2img": "an orange ring on a blue background",
    "zimage_base_txt2img": "a red ring on a white background",
    "zimage_base_single_files": "a yellow ring on a blue background",
    "zimage_base_int8": "a green ring on a yellow background",
}


def file(content: dict[str, Any]) -> Any:
    """What a loader has chosen; of other nodes the wire to their model, or None."""
    inputs = content["inputs"]
    return next((inputs[name] for name in ("lora", "control_net", "model") if name in inputs), None)


def model(content: dict[str, Any]) -> dict[str, str] | None:
    name = file(content)
    if not isinstance(name, str) or name not in FILES:
        return None
    address, folder, _ = FILES[name]
    path = f"{folder}/{name}" if "split_files" in address else name
    return {"name": name, "url": f"{address}/{path}", "directory": folder}


def links(prompt: dict[str, Any]) -> str:
    lines = []
    for content in prompt.values():
        if (found := model(content)) is not None:
            size = FILES[found["name"]][2]
            about = f"{size}, " if size else ""
            lines.append(f"- [{found['name']}]({found['url']}): {about}into models/{found['directory']}")
    return "\n".join(lines)
