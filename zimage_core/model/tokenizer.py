"""Prompt to token ids: Qwen's chat template around the prompt, cut at a limit that is reported."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

logger = logging.getLogger(__name__)

# Qwen3's chat template for one user turn with thinking enabled (so without an empty think block) and no system turn
PROMPT_TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
WORDS = "words.txt"  # in a tokenizer's folder, where a model knows few words: all of them
MAX_LENGTH = 512  # tokens, template included (reference `max_sequence_length`)


def without_halves(text: str) -> str:
    """The text, with U+FFFD for each half of a character (a lone surrogate), which no tokenizer takes; it warns."""
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if whole.count("\ufffd") > text.count("\ufffd"):
        logger.warning("The prompt holds half a character (of an emoji, perhaps), which is read as \ufffd: %.80r", text)
    return whole


class Tokenizer:
    """The snapshot's byte-level BPE behind the chat template."""

    def __init__(self, folder: str | os.PathLike[str]):
        from transformers import AutoTokenizer  # here, as it takes a second that downloads and --help do without

        self.inner = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self.pad_id: int = self.inner.pad_token_id
        known = Path(folder) / WORDS
        self.words = frozenset(known.read_text(encoding="utf-8").split()) if known.is_file() else None

    def unknown(self, prompt: str) -> list[str]:
        """Words of a prompt that a model of few words was never shown; none for a model that doesn't list its words."""
        found = re.findall(r"\w+", prompt.lower())
        return [] if self.words is None else [word for word in dict.fromkeys(found) if word not in self.words]

    def __call__(self, prompt: str, max_length: int = MAX_LENGTH) -> list[int]:
        """Ids of the templated prompt, at most `max_length`; a longer prompt loses its end, with a warning."""
        if not isinstance(prompt, str):
            raise TypeError(f"a prompt must be a string, got {type(prompt).__name__}")
        prompt = without_halves(prompt)
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}, expected at least 1")
        ids: list[int] = self.inner(PROMPT_TEMPLATE.format(prompt), verbose=False)["input_ids"]
        return ids[: self.limited(ids, max_length)]

    def limited(self, ids: list[int], max_length: int = MAX_LENGTH) -> int:
        """How many of these ids are taken; what is lost is said in the log."""
        if len(ids) > max_length:
            lost = self.inner.decode(ids[max_length:-_SUFFIX_TOKENS] or ids[max_length:])
            logger.warning(
                "The prompt is %d tokens long, the limit is %d: its end is ignored, from %r on. Shorten the prompt "
                "or raise the limit.",
                len(ids),
                max_length,
                lost[:80],
            )
        return min(len(ids), max_length)


_SUFFIX_TOKENS = 5  # <|im_end|>, newline, <|im_start|>, assistant, newline
