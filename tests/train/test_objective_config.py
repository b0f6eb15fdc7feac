"""Keys of objectives: what goes together, where a mask token comes from, and what is said of all else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helixpipe.config import Config
from helixpipe.config_text import build_config, merged, parse_arguments, to_table
from helixpipe.errors import ConfigError
from helixpipe.train.job import prepare
from helixpipe.train.log import described
from helixpipe.train.mask_token import mask_token, with_mask_token
from helixpipe.train.objective import Objective

BOTH_SIDES = {"causal": False}


def config_of(objective: str, model: dict[str, Any] | None = None, data: str = "", **train: Any) -> Config:
    return build_config({
        "model": BOTH_SIDES | (model or {}), "data": {"path": data}, "train": {"objective": objective, **train},
    })  # fmt: skip


def refused(table: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        build_config(table)
    return str(caught.value)


@pytest.mark.parametrize(
    ("train", "model", "line"),
    [
        (
            {},
            BOTH_SIDES,
            "model.causal: false, and a bidirectional model sees the token that next_token asks for; set train.objective to "
            "masked or masked_diffusion, or model.causal to true",
        ),
        (
            {"objective": "masked_diffusion"},
            {},
            "train.objective: masked_diffusion asks for tokens from both sides, and the model is causal; set model.causal to "
            "false, or train.objective to next_token",
        ),
        (
            {"objective": "mask"},
            BOTH_SIDES,
            "train.objective: 'mask' is not known; did you mean 'masked'?",
        ),
        ({"mask_share": 0.2}, {}, "train.mask_share: next_token has no such key, masked has; remove it"),
        (
            {"mask_token": 3},
            {},
            "train.mask_token: next_token has no such key, masked or masked_diffusion has; remove it",
        ),
        (
            {"objective": "masked_diffusion", "mask_replace": [1.0, 0.0, 0.0]},
            BOTH_SIDES,
            "train.mask_replace: masked_diffusion has no such key, masked has; remove it",
        ),
        (
            {"objective": "masked", "mask_share": 0.0},
            BOTH_SIDES,
            "train.mask_share: 0; give a share above 0 and at most 1, such as 0.15",
        ),
        (
            {"objective": "masked", "mask_share": 1.5},
            BOTH_SIDES,
            "train.mask_share: 1.5; give a share above 0 and at most 1, such as 0.15",
        ),
        (
            {"objective": "masked", "mask_replace": [0.8, 0.1, 0.2]},
            BOTH_SIDES,
            "train.mask_replace: 0.8, 0.1, 0.2; give three shares, none below 0, that add up to 1",
        ),
        (
            {"objective": "masked", "mask_replace": [1.2, -0.1, -0.1]},
            BOTH_SIDES,
            "train.mask_replace: 1.2, -0.1, -0.1; give three shares, none below 0, that add up to 1",
        ),
        (
            {"objective": "masked", "mask_replace": [0.5, 0.5]},
            BOTH_SIDES,
            "train.mask_replace: [0.5, 0.5] will not do; give 3 numbers",
        ),
        ({"objective": "masked", "mask_token": -1}, BOTH_SIDES, "train.mask_token: -1; give at least 0"),
    ],
)
def test_what_cannot_be_is_one_line(train: dict[str, Any], model: dict[str, Any], line: str) -> None:
    assert refused({"train": train, "model": model}) == line


def test_segments_of_a_bidirectional_model_stay_refused() -> None:
    line = refused({
        "train": {"objective": "masked", "mask_token": 255}, "model": BOTH_SIDES,
        "schedule": {"family": "seq1f1b", "segments": 2},
    })  # fmt: skip
    assert line.startswith("schedule.segments: 2 segments need causal attention (model.causal)")


def test_shares_have_the_defaults_of_the_papers_and_can_be_given() -> None:
    found = Objective.of(config_of("masked", mask_token=255))
    assert (found.share, found.replace, found.mask_token) == (0.15, (0.8, 0.1, 0.1), 255)
    keys = ("objective=masked", "mask_token=7", "mask_replace=1,0,0", "mask_share=0.3")
    given = parse_arguments(["--model.causal", "false", *(f"--train.{key}" for key in keys)])
    found = Objective.of(build_config(given.overrides))
    assert (found.share, found.replace, found.mask_token) == (0.3, (1.0, 0.0, 0.0), 7)


def test_another_objective_does_not_inherit_keys_it_does_not_have() -> None:
    base = {"train": {"objective": "masked", "mask_share": 0.3, "mask_token": 9, "steps": 4}}
    both = merged(base, {"train": {"objective": "masked_diffusion"}})
    assert both["train"] == {"objective": "masked_diffusion", "mask_token": 9, "steps": 4}
    assert merged(base, {"train": {"objective": "next_token"}})["train"] == {"objective": "next_token", "steps": 4}
    assert merged(base, {"train": {"steps": 5}})["train"]["mask_share"] == 0.3


def write(folder: Path, tokenizer: dict[str, Any], **files: Any) -> Path:
    """A folder with a tokenizer's files."""
    folder.mkdir(parents=True)
    for name, content in {"tokenizer": tokenizer, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


ADDED = {"added_tokens": [{"id": 3, "content": "<s>"}, {"id": 77, "content": "[MASK]", "special": True}]}
NAMED = {"tokenizer_config": {"mask_token": "[MASK]"}}


@pytest.mark.parametrize(
    ("tokenizer", "files", "found"),
    [
        (ADDED, NAMED, 77),
        (ADDED, {"special_tokens_map": {"mask_token": {"content": "[MASK]", "lstrip": True}}}, 77),
        ({"model": {"vocab": {"a": 0, "[MASK]": 5}}}, NAMED, 5),
        ({"model": {"vocab": [["a", -1.0]]}}, NAMED, None),
        (ADDED, {"tokenizer_config": {"mask_token": None}}, None),
        (ADDED, {}, None),
    ],
)
def test_a_mask_token_is_the_one_that_the_tokenizer_names(
    tmp_path: Path, tokenizer: dict[str, Any], files: dict[str, Any], found: int | None
) -> None:
    """That of prepared data; what is given goes before."""
    write(tmp_path / "data" / "tokenizer", tokenizer, **files)
    config = config_of("masked", data=str(tmp_path / "data"))
    if found is None:
        with pytest.raises(ConfigError) as caught:
            mask_token(config)
        assert str(caught.value) == (
            "train.mask_token: masked needs one, and neither data.path nor model.path has a tokenizer that names its mask_token; "
            "give an id that the data does not have (of text read as bytes: 255)"
        )
        return
    assert mask_token(config) == found
    assert with_mask_token(config).train.mask_token == found
    assert mask_token(config_of("masked", data=str(tmp_path / "data"), mask_token=9)) == 9


def test_a_mask_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "data" / "tokenizer", ADDED, **NAMED)
    with pytest.raises(ConfigError) as caught:
        mask_token(config_of("masked", {"vocabulary": 77}, str(tmp_path / "data")))
    assert str(caught.value) == (
        f"train.mask_token: 77 of the tokenizer in '{folder}' does not fit a vocabulary of 77; give another, or raise "
        "model.vocabulary"
    )
    with pytest.raises(ConfigError) as caught:
        mask_token(config_of("masked", mask_token=256))
    assert str(caught.value) == (
        "train.mask_token: 256 does not fit a vocabulary of 256; give another, or raise model.vocabulary"
    )


def test_a_run_is_made_ready_with_its_mask_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything starts; without one nothing does. What has no objective of its own says nothing of it."""
    monkeypatch.chdir(tmp_path)
    words = ["--model.causal", "false", "--train.objective", "masked_diffusion", "--train.sequence_length", "32"]
    with pytest.raises(ConfigError, match="masked_diffusion needs one"):
        prepare(words, print)
    config = prepare([*words, "--train.mask_token", "255"], print).config
    assert config.train.mask_token == 255
    assert described(config, "cpu").endswith("4 micro-batches of 1 x 32 tokens, objective masked_diffusion")
    assert with_mask_token(Config()) == Config()
    assert not {"mask_share", "mask_replace", "mask_token"} & set(to_table(Config())["train"])
    assert described(Config(), "cpu").endswith("4 micro-batches of 1 x 1024 tokens")


def test_a_mask_token_that_the_data_has_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("ab" * 4000)
    words = ["--model.causal=false", "--train.objective=masked", "--train.sequence_length=32", "--data.path=a.txt"]
    told: list[str] = []
    prepare([*words, "--train.mask_token=99"], told.append)
    assert told == []
    prepare([*words, "--train.mask_token=97"], told.append)
    assert told == [
        "train.mask_token: 97, and 64 tokens of the first batch are it, which no model can tell from masked ones; give an id that "
        "the data does not have"
    ]
