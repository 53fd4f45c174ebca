"""What can be wrong with what the user gives, each error saying what to do."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A model file or folder can't be used. The message names the file, what is wrong with it and what to do."""
