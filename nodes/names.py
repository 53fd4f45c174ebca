"""Under which names people look for the nodes."""

from __future__ import annotations

CATEGORY = "Z-Image"
# of every node; node search reads a node's title and id, and these
ALIASES = ["zimage", "z-image", "z image", "zit", "\u9020\u76f8"]  # the last is its name in Chinese
TEXT_TO_IMAGE = "\u6587\u751f\u56fe"
