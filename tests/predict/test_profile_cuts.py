"""What training does with a measured profile: segments are cut and stages balanced by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_profile import PROFILE

from helixpipe.config import Config
from helixpipe.config_text import build_config
from helixpipe.predict.profile import Profile
from helixpipe.schedule.partition import from_costs

TOKENS, SEGMENTS, MULTIPLE, SEQUENCES = 4096, 4, 16, 2


def training(profile: Path | None, schedule: dict[str, Any], **sections: dict[str, Any]) -> Config:
    """Of the shape and precision that PROFILE was measured with; by FLOPs without a profile."""
    measured = {"profile": str(profile)} if profile else {}
    return build_config({"schedule": schedule | measured} | sections)


def cut(profile: Path | None, recompute: str) -> tuple[int, ...] | None:
    schedule = {"family": "seq1f1b", "segments": SEGMENTS, "segment_multiple": MULTIPLE}
    train = {"sequence_length": TOKENS, "microbatch_size": SEQUENCES}
    config = training(profile, schedule, train=train, runtime={"recompute": recompute})
    return config.segment_lengths(config.build_schedule())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    PROFILE.save(tmp_path / "profile.json")
    return tmp_path / "profile.json"


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_segments_cost_the_same_in_measured_seconds(file: Path, recompute: str) -> None:
    found = cut(file, recompute)
    assert found == from_costs(TOKENS, SEGMENTS, PROFILE.partition_seconds(recompute, SEQUENCES), MULTIPLE)
    assert found != cut(None, recompute)


def test_each_policy_has_a_cut_of_its_own(file: Path) -> None:
    """So that the test above cannot pass with one policy for all."""
    assert len({cut(file, recompute) for recompute in ("none", "selective", "full")}) == 3


def weighing(factors: dict[str, float]) -> Profile:
    """PROFILE with an embedding and a head that cost next to nothing, unless `factors` says otherwise."""
    factors = {"embed": 1e-3, "head": 1e-3} | factors
    return replace(
        PROFILE, timings=tuple(t._replace(seconds=t.seconds * factors.get(t.kind, 1)) for t in PROFILE.timings)
    )


@pytest.mark.parametrize(
    ("factors", "layers"),
    [({}, [3, 3, 3]), ({"head": 5}, [3, 4, 2]), ({"embed": 30}, [2, 4, 3])],
    ids=["neither", "head", "embedding"],
)
def test_a_dear_embedding_or_head_moves_layers(tmp_path: Path, factors: dict[str, float], layers: list[int]) -> None:
    weighing(factors).save(tmp_path / "profile.json")
    config = training(tmp_path / "profile.json", {"family": "1f1b", "ranks": 3}, model={"layers": 9})
    stages = config.build_schedule().stages
    assert [sum(part.kind == "attn" for part in stage.parts) for stage in stages] == layers
