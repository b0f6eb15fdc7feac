"""What tests of several commands share."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_data import make_folders

from helixpipe.parts.shapes import SHAPES
from helixpipe.predict.profile import CURVES, PASSES, Profile, Timing


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As `real_data.make_folders` makes them."""
    return make_folders(tmp_path_factory.mktemp("data"))


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """A profile of the tiny model: attention's cost grows with what is before it, all else with the tokens."""
    timings = tuple(
        Timing(kind, PASSES[name], length, context, 1e-6 * length * (1 + (context + length if kind == "attn" else 0)))
        for kind, name in CURVES
        for length, context in ((256, 0), (512, 0), (1024, 0), (512, 512), (256, 768))
    )
    path = tmp_path / "profile.json"
    Profile(SHAPES["tiny"], "made up", "float32", 1, 2, "2.9", timings).save(path)
    return path
