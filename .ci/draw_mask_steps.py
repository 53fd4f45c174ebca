"""Draws docs/images/mask_steps.svg: at which of 8 steps a latent pixel under a soft mask is free.

.venv/bin/python .ci/draw_mask_steps.py
"""

from __future__ import annotations

from pathlib import Path

STEPS, SHIFT, SIGMA_MIN = 8, 3.0, 0.003
MASKS = (0.0, 0.25, 0.5, 0.75, 1.0)
CELL, LEFT, GAP = 30, 70, 60
OUT = Path(__file__).resolve().parent.parent / "docs" / "images" / "mask_steps.svg"


def ours(mask: float, step: int) -> bool:
    """zimage_core/sampling/start.py: what this step (from 1) makes is kept unless the mask is above the steps left."""
    return mask > (STEPS - step) / STEPS


def comfyui(mask: float, step: int) -> bool:
    """DifferentialDiffusion: free where the mask reaches the noise level at which the step begins."""
    share = 1 - (step - 1) / STEPS
    sigma = SHIFT * share / (1 + (SHIFT - 1) * share)
    return mask >= (sigma - SIGMA_MIN) / (1 - SIGMA_MIN)


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'


def main() -> None:
    side = STEPS * CELL
    width, height = LEFT + 2 * side + GAP + 20, 80 + len(MASKS) * CELL + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, (title, free) in enumerate((("here: by steps", ours), ("DifferentialDiffusion: by noise", comfyui))):
        left = LEFT + number * (side + GAP)
        parts.append(text(left + side / 2, 24, title))
        for step in range(1, STEPS + 1):
            parts.append(text(left + (step - 0.5) * CELL, 50, str(step)))
        for row, mask in enumerate(MASKS):
            top = 60 + row * CELL
            parts.append(text(left - 8, top + CELL * 0.65, f"{'mask ' if not number else ''}{mask:g}", "end"))
            for step in range(1, STEPS + 1):
                fill = "#f28e2b" if free(mask, step) else "#d9d9d9"
                at = f'x="{left + (step - 1) * CELL}" y="{top}" width="{CELL - 2}" height="{CELL - 2}"'
                parts.append(f'<rect {at} fill="{fill}"/>')
    below = 60 + len(MASKS) * CELL + 34
    for left, fill, words in ((LEFT, "#d9d9d9", "kept"), (LEFT + 90, "#f28e2b", "free: repainted in this step")):
        parts.append(f'<rect x="{left}" y="{below - 13}" width="16" height="16" fill="{fill}"/>')
        parts.append(text(left + 22, below, words, "start"))
    OUT.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
