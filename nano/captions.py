"""What people would say of a scene: full descriptions, short phrases, long-winded prompts and complaints of blur."""

from __future__ import annotations

import random
import re

from .scenes import COLORS, EXTRA_SHAPES, SIZES, Scene, sample

PREFIXES = ("a picture of ", "an image of ", "a photo of ", "a drawing of ", "draw ", "an illustration of ", "show me ")
WORDY = (
    "a simple flat illustration of ",
    "a minimal vector drawing that shows ",
    "please draw a clean and simple picture of ",
    "a high quality flat design picture of ",
)
ENDINGS = (
    ", flat design",
    ", simple shapes, plain colours",
    ", minimalist vector art, clean sharp edges, high quality",
    ", in a flat and simple style with solid colours and crisp outlines, best quality, highly detailed",
    ". The picture is simple and flat, the outlines are sharp and the colours are plain and solid",
)
COMPLAINTS = (
    "blurry",
    "blurry, low quality",
    "low quality",
    "worst quality, low quality",
    "blurry, ugly, deformed",
    "ugly, bad anatomy, extra fingers",
    "jpeg artifacts, noise",
    "out of focus",
    "low resolution, blurry, watermark, text",
    "bad quality, distorted",
)
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
SIZE_WORDS = {
    "small": ("small", "small", "small", "little", "tiny"),
    "large": ("large", "large", "large", "big", "huge"),
}
NUMBERS = {2: ("two", "two", "two", "2"), 3: ("three", "three", "three", "3")}


def describe(scene: Scene, rng: random.Random) -> str:
    """A full caption: everything that the bars judge is said in it."""
    text = {"one": _one, "pair": _pair, "count": _count}[scene.kind](scene, rng)
    manner = rng.random()
    if manner < 0.4:
        text = rng.choice(PREFIXES) + text
    elif manner < 0.46:
        text = rng.choice(WORDY) + text
    if rng.random() < 0.1:
        text += rng.choice(ENDINGS)
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.1:
        text += "."
    return text


def caption(scene: Scene, rng: random.Random, *, empty: float = 0.1, short: float = 0.12) -> str:
    """A training caption: now and then empty (what guidance departs from) or a phrase (what negatives look like)."""
    if rng.random() < empty:
        return ""
    if scene.blurred:
        return rng.choice(COMPLAINTS) if rng.random() < 0.7 else f"a blurry picture of {describe(scene, rng)}"
    return phrase(scene, rng) if rng.random() < short else describe(scene, rng)


def phrase(scene: Scene, rng: random.Random) -> str:
    """A few words that are true of the scene and leave most of it open."""
    color, shape = rng.choice(scene.objects)
    background = _spelled(scene.background_name, rng)
    seen = _spelled(color, rng)
    options = [
        seen,
        _an(shape),
        shape,
        f"{seen} {shape}",
        _an(f"{seen} {shape}"),
        f"{background} background",
        _an(f"{background} background"),
    ]
    if scene.kind == "count":
        number = rng.choice(NUMBERS[len(scene.objects)])
        options += [f"{number} {_plural(shape)}", f"{number} {seen} {_plural(shape)}", f"{seen} {_plural(shape)}"]
    if scene.kind == "pair":
        (color_a, shape_a), (color_b, shape_b) = scene.objects
        options += [f"{_an(f'{color_a} {shape_a}')} and {_an(f'{color_b} {shape_b}')}", f"{shape_a} and {shape_b}"]
    if scene.size:
        options += [scene.size, f"{scene.size} {shape}"]
    if scene.kind == "one" and scene.place:
        options += [f"{_an(shape)} {_where(scene.place, rng)}", f"{_an(f'{seen} {shape}')} {_where(scene.place, rng)}"]
    return rng.choice(options)


def vocabulary() -> list[str]:
    """Words that the tokenizer should know whole even where they are rare."""
    return [*COLORS, "grey", *SIZES, *COMPLAINTS, *ENDINGS, *WORDY]


def words() -> list[str]:
    """All words that captions are made of, and the one that the LoRA brings: what the model can know."""
    rng = random.Random("words")
    said = [caption(sample(rng, allowed=lambda color, shape: True), rng) for _ in range(20_000)]
    said += [*PREFIXES, *vocabulary(), *EXTRA_SHAPES, *map(_plural, EXTRA_SHAPES)]
    return sorted({word for text in said for word in re.findall(r"\w+", text.lower())})


def _one(scene: Scene, rng: random.Random) -> str:
    color, shape = scene.objects[0]
    size = f"{rng.choice(SIZE_WORDS[scene.size])} " if scene.size else ""
    thing = f"{size}{_spelled(color, rng)} {shape}"
    thing = _an(thing) if rng.random() < 0.85 else thing
    if not scene.place:
        return thing + _on(scene, rng)
    where = _where(scene.place, rng)
    return rng.choice((f"{thing} {where}", f"{thing} {where}", f"{thing}, {where}")) + _on(scene, rng)


def _where(place: str, rng: random.Random) -> str:
    if place == "center":
        return rng.choice(("in the center", "in the middle", "at the center"))
    if " " in place:
        return rng.choice((f"in the {place} corner", f"in the {place}", f"at the {place}", f"on the {place}"))
    return rng.choice((f"on the {place}", f"at the {place}", f"on the {place} side"))


def _pair(scene: Scene, rng: random.Random) -> str:
    first, second = (_an(f"{_spelled(color, rng)} {shape}") for color, shape in scene.objects)
    relation = scene.relation or ""
    other = OPPOSITE[relation]
    if relation in ("left", "right"):
        options = (
            f"{first} on the {relation} and {second} on the {other}",
            f"{first} to the {relation} of {second}",
            f"{first} {relation} of {second}",
        )
    else:
        top, bottom = ("top", "bottom") if relation == "above" else ("bottom", "top")
        word = relation if relation == "above" or rng.random() < 0.6 else "under"
        options = (
            f"{first} {word} {second}",
            f"{first} at the {top} and {second} at the {bottom}",
            f"{first} {word} {second}",
        )
    return rng.choice(options) + _on(scene, rng)


def _count(scene: Scene, rng: random.Random) -> str:
    (color, shape), number = scene.objects[0], len(scene.objects)
    things = f"{rng.choice(NUMBERS[number])} {_spelled(color, rng)} {_plural(shape)}"
    if scene.place == "column":
        options = (f"{things}, one above the other", f"{things} stacked vertically", f"{things} in a column")
    elif number == 2:
        options = (things, things, f"{things} side by side", f"{things} next to each other")
    else:
        options = (things, things, f"{things} in a row")
    return rng.choice(options) + _on(scene, rng)


def _on(scene: Scene, rng: random.Random) -> str:
    background = _spelled(scene.background_name, rng)
    return rng.choice(
        (
            f" on {_an(background)} background",
            f" on {_an(background)} background",
            f", {background} background",
            f" on {background}",
            f" with {_an(background)} background",
            f" against {_an(background)} background",
        )
    )


def _spelled(color: str, rng: random.Random) -> str:
    return "grey" if color == "gray" and rng.random() < 0.3 else color


def _an(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"
