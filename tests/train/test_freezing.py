"""What is frozen by pattern: which names, what is refused, what a run says and does, and how it goes on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import helixpipe as hp
from helixpipe.config_text import build_config, write_toml
from helixpipe.errors import CheckpointError
from helixpipe.parts.freezing import freeze
from helixpipe.train.job import Job, prepare
from helixpipe.train.loop import train
from helixpipe.train.stop import Stop

SHAPE = hp.ModelShape(layers=12, hidden=16, heads=2, ffn=16, vocabulary=16)
NAMES = set(SHAPE.parameter_elements(SHAPE.chain()))


def frozen(*patterns: str) -> set[str]:
    shape = freeze(SHAPE, patterns)
    return {name for name in NAMES if not shape.trains(name)}


def test_patterns_name_parameters() -> None:
    assert freeze(SHAPE, ()) is SHAPE
    assert frozen("embed*") == {"embed.tokens.weight"}
    assert frozen("layers.0-9.*") == {name for name in NAMES if name.startswith("layers.") and name[8] == "."}
    assert frozen("layers.9-11.qkv.[qk].weight") == {
        f"layers.{n}.qkv.{each}.weight" for n in (9, 10, 11) for each in "qk"
    }
    assert frozen("layers.3-3.norm.weight", "head.norm.weight") == {"layers.3.norm.weight", "head.norm.weight"}
    assert frozen("*norm*") == {name for name in NAMES if "norm" in name}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["embd*"],
            "train.freeze: 'embd*' is no parameter; the nearest are ",
        ),
        (
            ["layers.5-30.*"],
            "train.freeze: 'layers.5-30.*' has 'layers.12.*', which is no parameter; the nearest are layers.",
        ),
        (["layers.7-3.*"], "train.freeze: 'layers.7-3.*' has layers 7 to 3; give the lower one first"),
        (
            ["layers.*", "embed.*", "head*"],
            "train.freeze: layers.*, embed.*, head* are all parameters, and nothing is left to train; name fewer",
        ),
        (["layers.0.attn.q.weight"], "train.freeze: 'layers.0.attn.q.weight' is no parameter; the nearest are layers."),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(patterns: list[str], message: str) -> None:
    with pytest.raises(hp.ConfigError) as caught:
        build_config({"model": {"layers": 12}, "train": {"freeze": patterns}})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_nearest_name_is_the_one_that_was_meant() -> None:
    with pytest.raises(hp.ConfigError, match=r"the nearest are embed\.tokens\.weight"):
        freeze(SHAPE, ["embed.token.weight"])
    with pytest.raises(hp.ConfigError, match=r"the nearest are layers\.0\.qkv\.q\.weight"):
        freeze(SHAPE, ["layers.0.qkv.query.weight"])


TRAINING = [
    "--schedule.family", "1f1b", "--schedule.ranks", "1", "--schedule.microbatches", "2", "--model.layers", "2",
    "--model.hidden", "16", "--model.heads", "2", "--model.ffn", "16", "--train.sequence_length", "16", "--train.steps", "4",
    "--train.warmup_steps", "0", "--run.checkpoint_every", "2", "--run.timeline_step", "0", "--train.evaluate_sequences", "2",
    "--train.schedule", "wsd", "--train.decay_steps", "2", "--train.z_loss", "1e-3", "--runtime.device", "cpu",
]  # fmt: skip
FREEZE = ["--train.freeze", "embed*,layers.0-0.*"]


def job(folder: Path, *more: str, freeze: list[str] = FREEZE) -> Job:
    text = folder / "text.txt"
    if not text.exists():
        text.write_bytes(bytes(range(32, 127)) * 20)
    words = [*TRAINING, *freeze, "--data.path", str(text), "--run.folder", str(folder / "run"), *more]
    return prepare(words, lambda line: None)


def state(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name."""
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    found = {name: torch.zeros(tuple(each.size)) for name, each in metadata.items()}  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process is one process
        dcp.load(found, checkpoint_id=path, no_dist=True)
    return found


def test_a_run_trains_the_rest_alone_and_goes_on_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("whole", "halves"):
        (tmp_path / name).mkdir()
    train(job(tmp_path / "whole"), "cpu", None, Stop())
    said = capsys.readouterr().err.splitlines()[0]
    shape = job(tmp_path / "halves").config.shape()
    trained = sum(n for name, n in shape.parameter_elements(shape.chain()).items() if shape.trains(name))
    assert f"{shape.parameter_count:,} parameters ({trained:,} trained), 2 layers" in said

    train(job(tmp_path / "halves", "--train.evaluate_every", "0"), "cpu", None, Stop())
    second = tmp_path / "halves/run/checkpoints/step-00000002"
    train(
        job(tmp_path / "halves", "--resume", str(second), "--run.folder", str(tmp_path / "halves/again")),
        "cpu",
        None,
        Stop(),
    )
    one, two = (state(tmp_path / place / "checkpoints/step-00000004") for place in ("whole/run", "halves/again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)

    for folder, steps in (("whole/run", [1, 2, 3, 4]), ("halves/again", [3, 4])):
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
        assert rates == pytest.approx({step: [2e-3, 2e-3, 1.1e-3, 2e-4][step - 1] for step in steps}, rel=1e-14)

    moments = {name for name in one if name.startswith("optimizer.")}
    assert {name.removeprefix("optimizer.").rsplit(".", 1)[0] for name in moments} == {
        name for name in shape.parameter_elements(shape.chain()) if shape.trains(name)
    }
    first = state(tmp_path / "whole/run/checkpoints/step-00000002")
    for name in shape.parameter_elements(shape.chain()):
        same = torch.equal(first[f"model.{name}"], one[f"model.{name}"])
        assert same == (not shape.trains(name)), name

    with pytest.raises(CheckpointError) as caught:
        job(
            tmp_path / "halves",
            "--resume",
            str(second),
            "--run.folder",
            str(tmp_path / "other"),
            freeze=["--train.freeze", "embed*"],
        )
    assert str(caught.value) == (
        f'{second}: its train.freeze is ["embed*", "layers.0-0.*"]; freeze the same parameters'
    )


def test_predictions_know_it() -> None:
    """Of the config: AdamW has two moments of 4 bytes of what is trained alone."""
    keys = {"model": {"layers": 4}, "schedule": {"family": "1f1b", "ranks": 2}}
    whole, half = (build_config(keys | {"train": {"freeze": names}}) for names in ([], ["embed*", "layers.0-1.*"]))
    assert 'freeze = [\n    "embed*",\n    "layers.0-1.*",\n]' in write_toml(half)
    moments = []
    for config in (whole, half):
        estimate = hp.estimate(config.build_schedule(), config.setting())
        moments.append(sum(estimate.timeline.standing[rank].optimizer_bytes for rank in range(2)))
    shape = half.shape()
    trained = sum(n for name, n in shape.parameter_elements(shape.chain()).items() if shape.trains(name))
    assert moments == [8 * shape.parameter_count, 8 * trained]
