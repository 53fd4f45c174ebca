"""How errors read: what is wrong comes first, without the module of a class and before the path."""

import pytest

from zimage_core import errors
from zimage_core.errors import CheckpointError
from zimage_core.hub.download import DownloadError


@pytest.mark.parametrize("kind", [CheckpointError, DownloadError])
def test_an_error_prints_as_its_name_what_is_wrong_and_the_path(kind):
    assert issubclass(kind, ValueError) and str(kind("the file is empty", "/models/m.safetensors")) == (
        "the file is empty (/models/m.safetensors)"
    )
    assert f"{kind.__module__}.{kind.__qualname__}" == f"builtins.{kind.__name__}"  # ComfyUI leaves builtins away
    assert str(kind("no model given")) == "no model given"


def test_every_error_for_users_is_covered():
    def below(kind):
        return {kind}.union(*map(below, kind.__subclasses__()))

    assert {kind.__name__ for kind in below(errors.CheckpointError)} == {"CheckpointError", "DownloadError"}
