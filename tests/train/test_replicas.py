"""mesh.dp = "auto" and train.batch_size: other ranks, the same sequences a step; or one line that says why not."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from helixpipe.config import Config
from helixpipe.config_text import build_config, merged, parse_arguments, to_table, write_toml
from helixpipe.errors import ConfigError
from helixpipe.train.data import open_corpus

ELASTIC: dict[str, Any] = {
    "schedule": {"ranks": 2}, "mesh": {"dp": "auto", "cp": 2}, "train": {"batch_size": 24, "microbatch_size": 3},
}  # fmt: skip


def divided(config: Config) -> tuple[int, int, int]:
    return config.mesh.dp, config.schedule.microbatches, config.batch_size


@pytest.mark.parametrize(("ranks", "dp", "microbatches"), [(None, 1, 8), (4, 1, 8), (8, 2, 4), (16, 4, 2), (32, 8, 1)])
def test_replicas_follow_from_ranks_and_micro_batches_from_the_batch(
    ranks: int | None, dp: int, microbatches: int
) -> None:
    config = build_config(ELASTIC, ranks)
    assert divided(config) == (dp, microbatches, 24)
    assert ranks is None or config.mesh_shape().size == ranks
    assert build_config(tomllib.loads(write_toml(config))) == config, "what is saved has numbers alone"


def test_a_step_reads_the_same_sequences_on_any_number_of_replicas() -> None:
    table = {
        "schedule": {"ranks": 1, "family": "1f1b"},
        "mesh": {"dp": "auto"},
        "train": {"batch_size": 8, "sequence_length": 16},
    }
    batches = [open_corpus(build_config(table, ranks)).batch(3) for ranks in (1, 2, 8)]
    assert all((batch.tokens == batches[0].tokens).all() for batch in batches)


def test_a_batch_size_alone_decides_micro_batches() -> None:
    assert divided(build_config({"train": {"batch_size": 6}})) == (1, 6, 6)
    assert divided(build_config({"train": {"batch_size": 6}, "schedule": {"microbatches": 6}})) == (1, 6, 6)
    assert divided(Config()) == (1, 4, 4)


@pytest.mark.parametrize(
    ("over", "ranks", "expected"),
    [
        ({"mesh": {"dp": "auto"}}, 4, (1, 8, 24)),
        ({"mesh": {"dp": 4}}, None, (4, 2, 24)),
        ({"train": {"batch_size": 48}}, None, (2, 8, 48)),
        ({"train": {"microbatch_size": 1}}, None, (2, 12, 24)),
        ({"train": {"steps": 7}}, None, (2, 4, 24)),
    ],
)
def test_a_run_that_goes_on_counts_micro_batches_anew(
    over: dict[str, Any], ranks: int | None, expected: tuple[int, int, int]
) -> None:
    saved = to_table(build_config(ELASTIC, 8))
    assert divided(build_config(merged(saved, over), ranks)) == expected


def test_the_command_line_says_auto() -> None:
    given = parse_arguments(["--mesh.dp", "auto", "--train.batch-size", "8"])
    assert given.overrides == {"mesh": {"dp": "auto"}, "train": {"batch_size": 8}}


@pytest.mark.parametrize(
    ("change", "ranks", "fault"),
    [
        (
            {"train": {}}, 8,
            "mesh.dp: auto, and then a step would have as many sequences as ranks allow; set train.batch_size to how many it has",
        ),
        (
            {}, 6,
            "mesh.dp: auto, and torchrun started 6 processes, which are no whole replicas of schedule.ranks 2 x mesh.cp 2 x "
            "mesh.tp 1; start a multiple of 4",
        ),
        (
            {}, 2,
            "mesh.dp: auto, and torchrun started 2 processes, which are no whole replicas of schedule.ranks 2 x mesh.cp 2 x "
            "mesh.tp 1; start a multiple of 4",
        ),
        (
            {}, 12,
            "train.batch_size: 24 sequences do not divide over mesh.dp 3 with micro-batches of 3; give a multiple of 9, or start "
            "other ranks",
        ),
        (
            {"mesh": {"dp": 16}}, None,
            "train.batch_size: 24 sequences do not divide over mesh.dp 16 with micro-batches of 3; give a multiple of 48",
        ),
        (
            {"schedule": {"microbatches": 3}}, None,
            "train.batch_size: 24, and schedule.microbatches 3 of 3 on mesh.dp 1 are 9 sequences; leave one of the two out",
        ),
        ({"train": {"batch_size": 0}}, None, "train.batch_size: 0; give at least 1"),
        ({"mesh": {"dp": "many"}}, None, "mesh.dp: 'many' will not do; give a whole number, or auto"),
        ({"mesh": {"dp": True}}, None, "mesh.dp: true will not do; give a whole number, or auto"),
        ({"mesh": {"dp": "auto", "cp": 0}}, 8, "mesh.cp: 0; give at least 1"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_one_line(change: dict[str, Any], ranks: int | None, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(ELASTIC | change, ranks)
    assert str(caught.value) == fault


def test_a_word_that_is_no_number_is_refused_on_the_command_line() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(["--mesh.dp", "some"])
    assert str(caught.value) == "--mesh.dp: 'some' will not do; give a whole number, or auto"
