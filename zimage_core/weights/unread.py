"""A network whose weights are read when they are needed, if ever."""

from __future__ import annotations

import torch

from ..errors import CheckpointError
from ..model.text_encoder import TextEncoder
from ..prompts.cache import stamps
from .component import Component


class UnreadEncoder:
    """A text encoder whose weights are read when it is built, though its files are checked before: it may never be."""

    def __init__(self, component: Component, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None):
        """dtype: of the weights, None the file's. Raises CheckpointError, naming the file, if it can't be built."""
        self.shapes = component.shapes
        self.identity = {"config": repr(component.config), "files": stamps(component.files.paths)}
        self._component = component
        self._device = device
        self._dtype = dtype
        # scales of a quantized weight can only be checked by reading it
        if not any(not part.is_gguf for name in self.shapes for part in component.packed(name)):
            component.build(device="meta", dtype=dtype)  # on this device no value is read

    def build(self) -> TextEncoder:
        """Raises CheckpointError if the files are no longer those that were opened."""
        if stamps(self._component.files.paths) != self.identity["files"]:
            raise CheckpointError(
                "the file has changed since it was opened; open the pipeline again", self._component.source
            )
        return self._component.build(device=self._device, dtype=self._dtype)
