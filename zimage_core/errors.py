"""What can be wrong with what the user gives, each error saying what to do."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A model file or folder can't be used: what is wrong with it and what to do, then the file in parentheses."""

    # ComfyUI shows an error's module before its name, of which users know nothing, unless it is this one
    __module__ = "builtins"

    def __init__(self, message: str, source: object = None):
        """source: the file, folder or repository."""
        super().__init__(message if source is None else f"{message} ({source})")
