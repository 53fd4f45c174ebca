"""Gives the nano text encoder its start: from a caption's last token, say everything that the caption says.

Classifying colors, shapes, places and counts takes minutes and hands the transformer features in which they are apart
from its first step on. The transformer's training then goes on training the encoder.

    python -m nano.train_text --minutes 3 --tokenizer runs/tokenizer --out runs/text.pt
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Linear

from zimage_core.config import TextEncoderConfig
from zimage_core.model.text_encoder import TextEncoder
from zimage_core.model.tokenizer import Tokenizer

from . import captions, scenes
from .optim import Ranks, autocast, rate, save_atomically

CONFIG = TextEncoderConfig(
    vocab_size=640,  # make_tokenizer.VOCABULARY
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,  # the last is never run, as in Z-Image
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rms_norm_eps=1e-6,  # this and the next: Qwen3's
    rope_theta=1_000_000.0,
)
COLORS = tuple(scenes.COLORS)
# what is asked of a caption -> its answers, "" where the caption does not say
QUESTIONS: dict[str, tuple[str, ...]] = {
    "background": COLORS,
    "color 1": COLORS,
    "shape 1": scenes.SHAPES,
    "color 2": ("", *COLORS),
    "shape 2": ("", *scenes.SHAPES),
    "place": ("", *scenes.PLACES, "row", "column"),
    "size": ("", *scenes.SIZES),
    "relation": ("", *scenes.RELATIONS),
    "number": ("1", "2", "3"),
}


def answers(scene: scenes.Scene) -> list[int]:
    """The index of the right answer to each question, in their order."""
    (color_1, shape_1), *others = scene.objects
    color_2, shape_2 = others[0] if scene.kind == "pair" else ("", "")
    right = {
        "background": scene.background_name,
        "color 1": color_1,
        "shape 1": shape_1,
        "color 2": color_2,
        "shape 2": shape_2,
        "place": scene.place or "",
        "size": scene.size or "",
        "relation": scene.relation or "",
        "number": str(len(scene.objects) if scene.kind == "count" else 1),
    }
    return [options.index(right[question]) for question, options in QUESTIONS.items()]


def build(seed: int = 0) -> TextEncoder:
    """A new encoder. Embeddings start at unit size, since a residual stream this shallow never rescales them."""
    torch.manual_seed(seed)
    encoder = TextEncoder(CONFIG)
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5 * module.in_features**-0.5)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0)
    return encoder


def token_batch(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, list[int]]:
    """Ids [B, L], padded on the right to a multiple of 32, and each caption's own length."""
    rows = [tokenizer(text) for text in texts]
    lengths = [len(row) for row in rows]
    longest = -(-max(lengths) // 32) * 32
    return torch.tensor([row + [tokenizer.pad_id] * (longest - len(row)) for row in rows]), lengths


def train(minutes: float, tokenizer_folder: Path, out: Path, seed: int = 0) -> float:
    """Trains for `minutes`, writes the encoder's weights, returns the share of right answers on new captions."""
    ranks = Ranks()
    if ranks.device.type == "cpu":
        torch.set_num_threads(1)
    tokenizer = Tokenizer(tokenizer_folder)
    encoder = build(seed).to(ranks.device)
    heads = Linear(CONFIG.hidden_size, sum(map(len, QUESTIONS.values()))).to(ranks.device)
    parameters = [*encoder.parameters(), *heads.parameters()]
    adam = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    rng = random.Random(f"text {seed}")
    start, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        drawn = [scenes.sample(rng) for _ in range(128)]
        loss, right = _judge(encoder, heads, tokenizer, drawn, rng)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        done = (time.monotonic() - start) / (60 * minutes)
        adam.param_groups[0]["lr"] = 2e-3 * rate(done, step, floor=0.05)
        adam.step()
        step += 1
        if step % 50 == 0:
            print(f"text {60 * minutes * done:4.0f} s  step {step}  loss {loss:.4f}  right {right:.4f}", flush=True)
    save_atomically({name: value.cpu() for name, value in encoder.state_dict().items()}, out)
    rng = random.Random("text report")
    with torch.no_grad():
        drawn = [scenes.sample(rng, allowed=lambda color, shape: True) for _ in range(512)]
        _, right = _judge(encoder, heads, tokenizer, drawn, rng)
    print(f"text: {right:.4f} of the answers about 512 new captions are right", flush=True)
    return right


def _judge(
    encoder: TextEncoder, heads: nn.Module, tokenizer: Tokenizer, drawn: list[scenes.Scene], rng: random.Random
) -> tuple[Tensor, float]:
    ids, lengths = token_batch(tokenizer, [captions.describe(scene, rng) for scene in drawn])
    device = next(heads.parameters()).device
    with autocast(device.type):
        features = encoder(ids.to(device)).float()  # (B, L, hidden)
    last = features[torch.arange(len(drawn)), torch.tensor(lengths) - 1]
    scores = heads(F.rms_norm(last, last.shape[-1:])).split([len(o) for o in QUESTIONS.values()], dim=1)
    right = torch.tensor([answers(scene) for scene in drawn], device=device).unbind(1)
    loss = torch.stack([F.cross_entropy(s, r) for s, r in zip(scores, right, strict=True)]).mean()
    share = torch.stack([(s.argmax(1) == r).float().mean() for s, r in zip(scores, right, strict=True)]).mean()
    return loss, share.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.minutes, arguments.tokenizer, arguments.out, arguments.seed)
