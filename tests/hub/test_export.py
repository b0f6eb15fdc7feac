"""Out: what was read is written bit for bit, transformers loads it, and its loss is ours."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from saved import KEYS, class_of, config_of, loss_of, saved

import helixpipe as hp
from helixpipe.cli import main
from helixpipe.config_text import build_config
from helixpipe.errors import CheckpointError, ConfigError, HelixpipeError
from helixpipe.hub.write import size_in_bytes
from helixpipe.train.checkpoint import Checkpoints

SPEED = {"schedule": {"family": "1f1b", "ranks": 1}}


def run_of(folder: Path, model: dict[str, Any], change: float = 0.0) -> Path:
    """A run with one checkpoint of the model's parameters, as one rank saves them; `change` is added to all."""
    config = build_config(SPEED | {"model": model, "train": {"sequence_length": 16}})
    made = hp.load(model["path"]) if "path" in model else hp.Decoder(config.shape())
    state = {}
    for part in made.shape.chain():
        for place, parameter in made.part(part).named_parameters():
            state[f"model.{made.shape.parameter_name(part, place)}"] = parameter.data + change
    Checkpoints(folder / "checkpoints", 1, None).save(state, 1, config)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for file in folder.glob("*.safetensors") for name, each in load_file(file).items()}


@pytest.mark.parametrize("name", [name for name in KEYS if name != "modernbert"])
def test_a_round_trip_is_bit_identical(name: str, tmp_path: Path) -> None:
    """In bfloat16, in several files; config.json says what it said, and transformers loads it to the same loss."""
    model = saved(tmp_path / "in", name, torch.bfloat16)
    run = run_of(tmp_path / "run", {"path": str(tmp_path / "in")})
    hp.export(run, tmp_path / "out", max_shard_size="3KB")
    before, after = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in before)
    assert config_of(tmp_path / "out") == config_of(tmp_path / "in")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = class_of(name).from_pretrained(tmp_path / "out", dtype=torch.float64, attn_implementation="eager")
    assert loss_of(again.eval()) == loss_of(model.double())


def test_a_bidirectional_model_goes_out_as_it_came(tmp_path: Path) -> None:
    """It is not trained for the next token, so no run has it: tensors alone."""
    from helixpipe.hub.folder import Folder
    from helixpipe.hub.load import read
    from helixpipe.hub.write import lines_of, made

    saved(tmp_path, "modernbert", torch.float32)
    folder = Folder.open(tmp_path)
    sources = folder.sources

    def whole(name: str) -> torch.Tensor:
        size = next(
            size
            for part in folder.shape.chain()
            for place, size in folder.shape.parameters(part).items()
            if folder.shape.parameter_name(part, place) == name
        )
        return read(sources[name], [(0, length) for length in size])

    out = {line.name: made(line, torch.float32, whole) for line in lines_of(folder.architecture.places(folder.shape))}
    before = tensors_of(tmp_path)
    assert before.keys() == out.keys()
    assert all(torch.equal(before[name], out[name]) for name in before)


def test_a_model_of_ones_own_becomes_the_architecture_that_fits(tmp_path: Path) -> None:
    sizes = {
        "name": "qwen3-8b",
        "layers": 2,
        "hidden": 16,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 4,
        "ffn": 24,
        "vocabulary": 19,
    }
    run = run_of(tmp_path / "run", sizes)
    found = hp.export(run, tmp_path / "out")
    assert (found.architecture, found.dtype, found.files, found.step) == ("qwen3", "float32", 1, 1)
    said = config_of(tmp_path / "out")
    assert (said["architectures"], said["max_position_embeddings"], said["dtype"]) == (
        ["Qwen3ForCausalLM"],
        40960,
        "float32",
    )
    model = class_of("qwen3").from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == found.parameters


def test_a_stretched_models_config_says_so_and_its_files_go_along(tmp_path: Path) -> None:
    saved(tmp_path / "in", "llama", torch.float32)
    along = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt", "chat_template.jinja"}
    for name in along | {"notes.txt"}:
        (tmp_path / "in" / name).write_text(name)
    stretched = {"path": str(tmp_path / "in"), "rope": {"type": "yarn", "factor": 4.0, "original": 16}}
    hp.export(run_of(tmp_path / "run", stretched), tmp_path / "out", dtype="float64")
    before, after = config_of(tmp_path / "in"), config_of(tmp_path / "out")
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {"rope_parameters", "max_position_embeddings", "dtype"}
    assert (after["max_position_embeddings"], after["dtype"]) == (64, "float64")
    assert after["rope_parameters"] | before["rope_parameters"] | {"rope_type": "yarn"} == {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    }  # fmt: skip
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == along | {"config.json", "generation_config.json", "model.safetensors"}


def refused(tmp_path: Path, message: str, run: str | Path = "run", folder: str = "out", **more: Any) -> None:
    with pytest.raises(HelixpipeError) as error:
        hp.export(tmp_path / run, tmp_path / folder, **more)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob(".*tmp"))


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "in", "llama", torch.float32)
    run_of(tmp_path / "run", {"path": str(tmp_path / "in")})
    (tmp_path / "there").mkdir()
    refused(tmp_path, "there: is there already; name a new folder, or remove it", folder="there")
    refused(tmp_path, "no is no folder; make it, or name another", folder="no/out")
    refused(tmp_path, "--dtype: 'int8' is not known; known: float64, float32, float16, bfloat16", dtype="int8")
    refused(tmp_path, "--max-shard-size: 'big' is no size; write 5GB, 500MB or 2GiB", max_shard_size="big")
    refused(tmp_path, "nowhere: no such folder; give a run folder or one of its checkpoints", run="nowhere")
    refused(tmp_path, "no good checkpoint in", run="there")
    run_of(tmp_path / "own", {"name": "tiny", "layers": 1})
    refused(
        tmp_path, "no architecture has this model: the nearest is llama, which cannot have model.mlp 'gelu'", run="own"
    )
    run_of(tmp_path / "large", {"path": str(tmp_path / "in")}, 1e5)
    refused(
        tmp_path,
        "some of its numbers are beyond float16; use bfloat16; nothing is written",
        run="large",
        dtype="float16",
    )
    run_of(tmp_path / "broken", {"path": str(tmp_path / "in")}, math.nan)
    refused(tmp_path, "embed.tokens.weight: it is not finite; nothing is written", run="broken")
    assert not (tmp_path / "out").exists()
    (tmp_path / "in" / "config.json").unlink()
    refused(tmp_path, "no config.json in it")


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "in", "llama", torch.float32)
    run_of(tmp_path / "run", {"path": str(tmp_path / "in")})

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("helixpipe.hub.write.made", full)
    refused(tmp_path, "out: cannot be written: no space left on device")
    assert not (tmp_path / "out").exists()


def test_nothing_but_a_tensor_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused tensor's rows are asked for together, and nothing else with them."""
    saved(tmp_path / "in", "phi3", torch.float32)
    run_of(tmp_path / "run", {"path": str(tmp_path / "in")})
    from helixpipe.hub import write

    asked: list[int] = []
    made = write.made

    def spy(line: write.Line, dtype: torch.dtype, read: Any) -> torch.Tensor:
        names: list[str] = []

        def noted(name: str) -> torch.Tensor:
            names.append(name)
            return read(name)

        found = made(line, dtype, noted)
        asked.append(len(names))
        return found

    monkeypatch.setattr(write, "made", spy)
    hp.export(tmp_path / "run", tmp_path / "out")
    assert set(asked) == {1, 2, 3}
    assert sum(asked) == len(hp.load(tmp_path / "in").sources)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1.5 kb", 1500), ("100", 100), ("3g", 3 * 10**9)],
)
def test_sizes_as_people_write_them(text: str, nbytes: int) -> None:
    assert size_in_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 XB", "0", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError):
        size_in_bytes(text)


@pytest.mark.timeout(200)
def test_train_export_and_transformers_from_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps on two ranks from a folder, resumed for a third; what comes out has our loss at the next batch."""
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "in", "qwen2", torch.float32, vocab_size=256)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    told = {
        "train.sequence_length": "16", "train.warmup_steps": "0", "train.learning_rate": "1e-2", "train.steps": "2",
        "schedule.microbatches": "4", "schedule.family": "helix", "data.path": "text.txt", "run.folder": "run",
        "run.timeline_step": "0",
    }  # fmt: skip
    words = [word for key, value in told.items() for word in (f"--{key}", value)]
    assert main(["train", "--model.path", "in", *words]) == 0
    assert main(["export", "run", "out"]) == 0
    out, _ = capfd.readouterr()
    assert "out: qwen2, " in out
    assert "parameters in float32, one file; from run/checkpoints/step-00000002, step 2" in out
    (tmp_path / "in" / "model.safetensors").unlink()  # a checkpoint needs it no more
    assert main(["train", "--resume", "run", "--train.steps", "3"]) == 0
    third = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-2])
    model = class_of("qwen2").from_pretrained(tmp_path / "out")
    before = tensors_of(tmp_path / "out")
    assert any(not torch.equal(before[key], value) for key, value in tensors_of(tmp_path / "out").items()) is False

    from helixpipe.config_text import read_toml
    from helixpipe.train.data import open_corpus

    batch = open_corpus(build_config(read_toml(tmp_path / "run" / "config.toml"))).batch(3)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(batch.tokens).long()).logits
    theirs = float(F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.targets).long().flatten()))
    assert third["loss"] == pytest.approx(theirs, abs=1e-5)
    assert dataclasses.is_dataclass(hp.export(tmp_path / "run", tmp_path / "third"))
    changed = tensors_of(tmp_path / "third")
    assert any(not torch.equal(before[key], changed[key]) for key in before)


def test_a_folder_is_evaluated_without_a_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over the same windows that transformers is asked for."""
    from helixpipe.train.data import open_corpus

    monkeypatch.chdir(tmp_path)
    model = saved(tmp_path / "in", "llama", torch.float32, vocab_size=256)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    told = {"train.sequence_length": "16", "data.path": "text.txt", "schedule.family": "1f1b", "schedule.ranks": "1"}
    words = ["--model.path", "in", *(word for key, value in told.items() for word in (f"--{key}", value))]
    capfd.readouterr()
    assert main(["evaluate", *words, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["weights"], found["step"]) == ("in", 0)
    table = {"model": {"path": "in"}, "train": {"sequence_length": 16}, "data": {"path": "text.txt"}} | SPEED
    total = counted = 0.0
    for batch in open_corpus(build_config(table)).evaluation(16):
        targets = torch.from_numpy(batch.targets).long().flatten()
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(batch.tokens).long()).logits.flatten(0, 1)
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
        counted += int((targets != -100).sum())
    assert found["tokens"] == counted
    assert found["loss"] == pytest.approx(total / counted, abs=1e-5)


def test_a_checkpoint_that_lacks_a_parameter(tmp_path: Path) -> None:
    saved(tmp_path / "in", "llama", torch.float32)
    config = build_config(SPEED | {"model": {"path": str(tmp_path / "in")}, "train": {"sequence_length": 16}})
    Checkpoints(tmp_path / "run" / "checkpoints", 1, None).save(
        {"model.embed.tokens.weight": torch.zeros(19, 16)}, 1, config
    )
    with pytest.raises(CheckpointError) as error:
        hp.export(tmp_path / "run", tmp_path / "out")
    assert "is not in it; choose another checkpoint" in str(error.value)
    assert not (tmp_path / "out").exists()
