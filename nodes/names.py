"""Under which names people look for the nodes."""

from __future__ import annotations

CATEGORY = "Z-Image"
# of every node; node search reads a node's title and id, and these
ALIASES = ["zimage", "z-image", "z image", "zit", "造相"]
