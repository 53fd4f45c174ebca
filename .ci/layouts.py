"""What draw_workflows.py adds to a prompt to make a graph of it: places, groups, wires' ways; `cards` has the words.

Nodes 2.0 draws widgets higher than LiteGraph does, and a line more where a model is missing. Every node is saved at the
larger height, so that both renderers draw the same.
"""

from __future__ import annotations

import uuid
from typing import Any

import cards

TITLE = 30  # pixels of a node's title, above its position
GAP = 40  # between columns
# left edge and width of each column: loaders, prompts, sampler, image
COLUMNS = {"A": (0, 380), "B": (420, 280), "C": (740, 380), "D": (1160, 320)}
# the same in five, where a graph makes two images: loaders, prompts, samplers, what is between, images
COLUMNS |= {"a": (0, 380), "b": (410, 280), "c": (720, 240), "d": (990, 230), "e": (1250, 250)}
# node type -> height without title that no renderer exceeds, a missing model included
HEIGHTS = {
    "ZImageTransformerLoader": 230,
    "ZImageTextEncoderLoader": 206,
    "ZImageVAELoader": 178,
    "ZImageTextEncode": 156,
    "EmptySD3LatentImage": 120,
    "ZImageSampler": 312,
    "ZImageVAEDecode": 108,
    "ZImageVAEEncode": 108,
    "ZImageLoraLoader": 210,
    "ZImageControlNet": 290,
    "ZImageInpaintPrepare": 334,
    "ZImageInpaintFinish": 106,
    "Canny": 90,
    "SolidMask": 118,
    "MaskComposite": 138,
    "LoadImage": 360,
    "SaveImage": 290,
    "PreviewImage": 256,
    "PreviewAny": 100,
    "MarkdownNote": 120,
}
NEGATIVE = {"color": "#322", "bgcolor": "#533"}  # LiteGraph's red

# node id -> (column, top[, height]); "note" is the note. Nothing is below a sampler: its preview makes it higher.
PLAIN = {
    "1": ("A", 0),
    "2": ("A", 290),
    "3": ("C", 0),
    "4": ("B", 110, 350),
    "6": ("B", 524),
    "7": ("C", 260),
    "8": ("D", 0),
    "9": ("D", 220, 390),
    "note": ("A", 580, 220),
}
WITH_NEGATIVE = PLAIN | {"4": ("B", 110), "5": ("B", 324)}
LORA = PLAIN | {
    "4": ("B", 0),
    "5": ("B", 292),
    "10": ("A", 712, 240),
    "note": ("D", 712, 240),
}
IMAGE = {
    "1": ("A", 0),
    "2": ("A", 290),
    "3": ("A", 566),
    "4": ("B", 50),
    "5": ("B", 240),
    "6": ("B", 432),
    "7": ("C", 0),
    "8": ("D", 0),
    "9": ("D", 150),
    "10": ("B", 820),
    "11": ("B", 630),
    "12": ("C", 616),
    "13": ("D", 488),
    "14": ("D", 638),
    "note": ("A", 790, 138),
}
CONTROL = {
    "1": ("a", 0),
    "2": ("a", 290),
    "3": ("a", 566),
    "4": ("b", 40),
    "6": ("b", 414),
    "7": ("c", 0),
    "8": ("d", 0),
    "9": ("e", 0),
    "10": ("d", 158),
    "11": ("d", 296),
    "12": ("b", 614),
    "13": ("b", 227),
    "14": ("c", 616),
    "15": ("d", 616),
    "16": ("e", 616),
    "note": ("a", 790, 138),
}
INPAINT = CONTROL | {
    "10": ("d", 166),
    "11": ("d", 318),
    "12": ("e", 362),
    "13": ("b", 614),
    "14": ("b", 227),
    "15": ("c", 616),
    "16": ("d", 616),
    "17": ("d", 790),
    "18": ("e", 616),
}
CONTROL_PHOTO = {
    "1": ("A", 0),
    "2": ("A", 290),
    "3": ("A", 566),
    "4": ("C", 362),
    "6": ("A", 808),
    "7": ("C", 602),
    "8": ("D", 0),
    "9": ("D", 150, 390),
    "10": ("B", 60),
    "11": ("B", 490),
    "12": ("B", 640),
    "13": ("C", 0),
    "note": ("D", 622, 306),
}
INPAINT_PHOTO = {
    "1": ("A", 0),
    "2": ("A", 290),
    "3": ("A", 566),
    "4": ("B", 490),
    "7": ("C", 602),
    "8": ("D", 352),
    "9": ("D", 658),
    "10": ("B", 60),
    "11": ("C", 60),
    "12": ("D", 0),
    "13": ("D", 506),
    "note": ("B", 692, 238),
}
PHOTO = PLAIN | {
    "4": ("B", 110),
    "5": ("B", 324),
    "6": ("B", 538),
    "10": ("A", 568),
    "note": ("D", 690, 238),
}
WIDER = {"10": 700}  # the LoRA report, below two columns

# (source, target, input) -> points that the wire passes, so that it runs beneath no node
IMAGE_IN_ITS_COLUMN = {("8", "9", "images"): [(1500, 149), (1140, 149)]}
WAYS = IMAGE_IN_ITS_COLUMN | {("1", "7", "model"): [(720, 14)]}
WAYS_ENCODE = WAYS | {("3", "6", "vae"): [(1136, 204), (724, 204), (724, 477), (404, 477)]}
WAYS_LORA = IMAGE_IN_ITS_COLUMN | {
    ("4", "5", "clip"): [(720, 236), (400, 236)],
    ("4", "10", "source"): [(720, 280), (720, 667), (-30, 667)],
}
WAYS_IMAGE = {
    ("8", "9", "images"): [(1500, 114), (1140, 114)],
    ("13", "14", "images"): [(1500, 602), (1140, 602)],
    ("1", "12", "model"): [(404, 60), (404, 560), (720, 560)],
    ("3", "8", "vae"): [(404, 569), (1136, 569)],
    ("3", "13", "vae"): [(404, 569), (1136, 569)],
    ("8", "10", "pixels"): [(1500, 114), (1500, 449), (1144, 449), (1144, 578), (404, 578)],
    ("5", "12", "negative"): [(720, 400), (720, 660)],
}
BEFORE = {  # from the first image back to where it is read, and what steers the first image
    ("1", "7", "model"): [(395, 4), (705, 4)],
    ("3", "8", "vae"): [(395, 558), (975, 558)],
}
WAYS_CONTROL = BEFORE | {
    ("1", "12", "model"): [(395, 540)],
    ("3", "15", "vae"): [(395, 558), (975, 558)],
    ("8", "10", "image"): [(1235, 118), (975, 118)],
    ("10", "11", "images"): [(1235, 257), (975, 257)],
    ("10", "12", "image"): [(1235, 257), (975, 257), (975, 568), (395, 568)],
}
WAYS_INPAINT = BEFORE | {
    ("1", "15", "model"): [(395, 540), (705, 540)],
    ("3", "16", "vae"): [(395, 558), (975, 558)],
    ("8", "13", "image"): [(1235, 122), (975, 122), (975, 568), (395, 568)],
    ("12", "13", "mask"): [(1515, 515), (970, 515), (970, 548), (395, 548)],
    ("13", "17", "crop"): [(705, 560), (975, 560)],
    ("16", "17", "image"): [(1235, 742), (975, 742)],
}
WAYS_CONTROL_PHOTO = {
    ("1", "13", "model"): [(404, 8), (720, 8)],
    ("3", "13", "vae"): [(404, 20), (720, 20)],
    ("3", "8", "vae"): [(404, 596), (720, 596), (720, 545), (1140, 545)],
    ("2", "4", "clip"): [(404, 440), (720, 440)],
    ("10", "11", "image"): [(716, 440), (404, 440)],
    ("11", "12", "images"): [(716, 596), (404, 596)],
    ("13", "7", "model"): [(1140, 311), (724, 311)],
    ("4", "7", "positive"): [(1140, 545), (724, 545)],
    ("6", "7", "latent_image"): [(404, 900), (720, 900)],
    ("8", "9", "images"): [(1500, 114), (1140, 114)],
}
WAYS_INPAINT_PHOTO = {
    ("1", "12", "model"): [(404, 8), (1140, 8)],
    ("3", "12", "vae"): [(404, 20), (1140, 20)],
    ("3", "11", "vae"): [(404, 20), (720, 20)],
    ("3", "8", "vae"): [(404, 440), (1140, 440)],
    ("11", "7", "latent_image"): [(1136, 470), (724, 470)],
    ("12", "7", "model"): [(1500, 306), (1136, 306), (1136, 540), (724, 540)],
    ("8", "13", "image"): [(1500, 468), (1140, 468)],
    ("13", "9", "images"): [(1500, 620), (1140, 620)],
}
WAYS_PHOTO = WAYS | {("3", "6", "vae"): [(1136, 204), (724, 204), (724, 494), (404, 494)]}
GROUPS = [
    ("Models", ["1", "2"]),
    ("Prompt and size", ["4", "5", "6"]),
    ("VAE and sampling", ["3", "7"]),
    ("Image", ["8", "9"]),
]
GROUPS_LORA = [
    ("Models", ["1", "2"]),
    ("LoRA, prompt and size", ["4", "5", "6"]),
    ("VAE and sampling", ["3", "7"]),
    ("Image", ["8", "9"]),
    ("What the LoRA matches", ["10"]),
]
GROUPS_IMAGE = [
    ("Models", ["1", "2", "3"]),
    ("First prompt and size", ["4", "5", "6"]),
    ("First image", ["7"]),
    ("Result", ["8", "9"]),
    ("Second prompt", ["10", "11"]),
    ("Change the image", ["12"]),
    ("Result", ["13", "14"]),
]
GROUPS_CONTROL = [
    ("Models", ["1", "2", "3"]),
    ("Prompts and size", ["4", "13", "6"]),
    ("First image and its outlines", ["7", "8", "9", "10", "11"]),
    ("Steer by the outlines", ["12"]),
    ("Second image", ["14", "15", "16"]),
]
GROUPS_INPAINT = [
    ("Models", ["1", "2", "3"]),
    ("Prompts and size", ["4", "14", "6"]),
    ("First image and mask", ["7", "8", "9", "10", "11", "12"]),
    ("What is repainted", ["13"]),
    ("Result", ["15", "16", "17", "18"]),
]
GROUPS_CONTROL_PHOTO = [
    ("Models and size", ["1", "2", "3", "6"]),
    ("Image and its outlines", ["10", "11", "12"]),
    ("Steer by the outlines", ["13"]),
    ("Prompt and sampling", ["4", "7"]),
    ("Result", ["8", "9"]),
]
GROUPS_INPAINT_PHOTO = [
    ("Models", ["1", "2", "3"]),
    ("Image, mask and prompt", ["10", "4"]),
    ("Cut out", ["11"]),
    ("Sampling", ["7"]),
    ("Control", ["12"]),
    ("Put back", ["8", "13", "9"]),
]
GROUPS_PHOTO = [
    ("Models", ["1", "2"]),
    ("Image", ["10"]),
    ("Prompts and latents", ["4", "5", "6"]),
    ("VAE and sampling", ["3", "7"]),
    ("Result", ["8", "9"]),
]
# API prompt -> its own places, ways and groups
OWN = {
    "zimage_nano_control": (CONTROL, WAYS_CONTROL, GROUPS_CONTROL),
    "zimage_nano_inpaint": (INPAINT, WAYS_INPAINT, GROUPS_INPAINT),
    "zimage_nano_outpaint": (
        INPAINT,
        WAYS_INPAINT,
        [
            ("First image", nodes) if title == "First image and mask" else (title, nodes)
            for title, nodes in GROUPS_INPAINT
        ],
    ),
    "zimage_turbo_control": (CONTROL_PHOTO, WAYS_CONTROL_PHOTO, GROUPS_CONTROL_PHOTO),
    "zimage_turbo_inpaint": (INPAINT_PHOTO, WAYS_INPAINT_PHOTO, GROUPS_INPAINT_PHOTO),
    "zimage_base_img2img": (PHOTO, WAYS_PHOTO, GROUPS_PHOTO),
}


def layout(name: str, prompt: dict[str, Any]) -> dict[str, Any]:
    """Everything that the page needs to draw this prompt: `nodes`, `ways`, `groups`, `note`, `id`.

    Where parts of the prompt `name` were left out, nothing of them is drawn.
    """
    if name in OWN:
        places, ways, groups = OWN[name]
    elif any(node["class_type"] == "ZImageLoraLoader" for node in prompt.values()):
        places, ways, groups = LORA, WAYS_LORA, GROUPS_LORA
    elif "14" in prompt:
        places, ways, groups = IMAGE, WAYS_IMAGE, GROUPS_IMAGE
    elif prompt["6"]["class_type"] == "ZImageVAEEncode":
        places, ways, groups = PLAIN, WAYS_ENCODE, GROUPS
    else:
        places, ways, groups = (WITH_NEGATIVE if "5" in prompt else PLAIN), WAYS, GROUPS
    types = {node: content["class_type"] for node, content in prompt.items()} | {"note": "MarkdownNote"}
    nodes = {node: _node(node, types[node], *places[node]) for node in types}
    for node, content in prompt.items():
        if "negative" in content["_meta"]["title"].lower():
            nodes[node] |= NEGATIVE
        if (model := cards.model(content)) is not None:
            nodes[node]["models"] = [model]
    title, text = cards.NOTES[name]
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-zimage/workflows/{name}")),
        "nodes": nodes,
        "ways": [[*wire, points] for wire, points in ways.items() if wire[0] in prompt and wire[1] in prompt],
        "groups": [
            [title, _around([nodes[node] for node in inner if node in nodes])]
            for title, inner in groups
            if nodes.keys() & set(inner)
        ],
        "note": {"title": title, "text": text.replace("{files}", cards.links(prompt))},
        "view": _view(list(nodes.values())),
        "app": _app(prompt),
    }


def _node(node: str, kind: str, column: str, top: int, height: int = 0) -> dict[str, Any]:
    left, width = COLUMNS[column]
    wide = WIDER.get(node, width) if kind == "PreviewAny" else width
    return {"pos": [left, top], "size": [wide, max(height, HEIGHTS[kind])]}


def _app(prompt: dict[str, Any]) -> dict[str, Any]:
    """What App mode shows: prompts, image, size and seed, and the images."""
    shown = {
        "ZImageTextEncode": ["text"],
        "LoadImage": ["image"],
        "EmptySD3LatentImage": ["width", "height"],
        "ZImageSampler": ["seed"],
    }
    inputs = [[node, name] for node, content in prompt.items() for name in shown.get(content["class_type"], [])]
    return {"inputs": inputs, "outputs": [node for node in prompt if prompt[node]["class_type"] == "SaveImage"]}


def _around(nodes: list[dict[str, Any]]) -> list[float]:
    """[left, top, width, height] of the group of these nodes."""
    left = min(node["pos"][0] for node in nodes) - 10
    top = min(node["pos"][1] for node in nodes) - TITLE - 42
    right = max(node["pos"][0] + node["size"][0] for node in nodes) + 10
    bottom = max(node["pos"][1] + node["size"][1] for node in nodes) + 10
    return [left, top, right - left, bottom - top]


def _view(nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """Where a window of 1366x768 looks: at everything, but near enough to read."""
    left, top, width, height = _around(nodes)
    scale = round(max(0.6, min(0.9, 1260 / width, 640 / height)), 3)
    return {"scale": scale, "offset": [90 / scale - left, 110 / scale - top]}
