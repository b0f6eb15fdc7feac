"""Folders that will not do: each one line that names what is wrong, before anything trains, and exit code 2."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved import LAYERS, change_config, config_of, saved
from torch import Tensor

import helixpipe as hp
from helixpipe.cli import main
from helixpipe.errors import ConfigError

GATE = "model.layers.1.mlp.gate_proj.weight"


def weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    """A change of a folder's tensors."""

    def write(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return write


def fill(number: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[GATE][3].fill_(number)


def cut(nbytes: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / "model.safetensors", nbytes)


def lost_shard(folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(whole))}
    first = {name: tensor for name, tensor in whole.items() if names[name].startswith("model-00001")}
    save_file(first, folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def other_shard(folder: Path) -> None:
    """The index says of a tensor that it is in a file that is there and has it not."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({name: tensor for name, tensor in whole.items() if name != GATE}, folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(whole, "a.safetensors")})
    )


class Code:
    """What a pickle can hold."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def pickled(what: object) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(what, folder / "pytorch_model.bin")

    return write


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


BAD: list[tuple[str, Callable[[Path], object], str]] = [
    ("no_config", lambda folder: (folder / "config.json").unlink(), "no config.json in it; give a folder that transformers' save_pretrained wrote"),
    ("config_is_no_json", lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON: "),
    ("config_is_a_list", lambda folder: (folder / "config.json").write_text("[]"), "config.json: not a JSON object; give a file that transformers wrote"),
    ("unknown", lambda folder: change_config(folder, model_type="mamba"), 'config.json: model_type: "mamba" is not known; known: llama, qwen2'),
    ("no_weights", no_weights, "no weights there: neither model.safetensors nor pytorch_model.bin, nor an index of many; give a whole folder"),
    ("truncated", cut(6000), "model.safetensors: truncated: 6,000 bytes where"),
    ("truncated_in_its_header", cut(100), "model.safetensors: truncated, or not safetensors: it ends within its header; fetch it again"),
    ("empty", cut(0), "model.safetensors: truncated, or not safetensors: it ends within its header"),
    ("no_safetensors", lambda folder: (folder / "model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"xx"), "model.safetensors: not safetensors: its header is not one; fetch it again"),
    ("lost_shard", lost_shard, "model-00002-of-00002.safetensors: missing, and model.safetensors.index.json says that tensors are in it; fetch it again"),
    ("other_shard", other_shard, f"a.safetensors: {GATE} is not in it, and model.safetensors.index.json says so; fetch it again"),
    ("bad_index", lambda folder: (no_weights(folder), (folder / "model.safetensors.index.json").write_text("{}")), "model.safetensors.index.json: no weight_map of tensors to files"),
    ("index_elsewhere", lambda folder: (no_weights(folder), (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')), "'../x.safetensors' is in another folder; shards lie beside their index"),
    ("code", pickled({GATE: Code()}), "pytorch_model.bin: refused: it holds more than tensors, and what it holds could run code; save it as safetensors"),
    ("no_table", pickled([1, 2]), "pytorch_model.bin: not a table of tensors; save the model's state_dict"),
    ("no_torch_file", lambda folder: (no_weights(folder), (folder / "pytorch_model.bin").write_bytes(b"nothing")), "pytorch_model.bin: no file of torch.save that can be memory-mapped: "),
    ("missing", weights(lambda tensors: tensors.pop(GATE)), f"{GATE} is missing; fetch the folder again"),
    ("headless", weights(lambda tensors: tensors.pop("lm_head.weight")), "lm_head.weight is missing; save the model with its head, not its base model alone"),
    ("extra", weights(lambda tensors: tensors.update({"model.layers.0.self_attn.sinks": torch.zeros(4)})), "model.layers.0.self_attn.sinks is no tensor of llama; give a model of this architecture alone"),
    ("wrong_shape", weights(lambda tensors: tensors.update({GATE: torch.zeros(24, 15)})), f"{GATE} is [24, 15], and config.json says [24, 16]; give the config that belongs to these weights"),
    ("more_layers", lambda folder: change_config(folder, num_hidden_layers=LAYERS + 1), f"model.layers.{LAYERS}.input_layernorm.weight is missing, and 8 more; fetch the folder again"),
    ("wrong_type", weights(lambda tensors: tensors.update({GATE: torch.zeros(24, 16, dtype=torch.int8)})), f"{GATE} is I8; known: F64, F32, F16, BF16: save it with whole weights"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "message"), BAD, ids=[name for name, *_ in BAD])
def test_each_is_one_line(
    name: str,
    spoil: Callable[[Path], object],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a call, and on the command line, with no run folder made."""
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "it", "llama", torch.float32, attention_bias=False)
    spoil(tmp_path / "it")
    with pytest.raises(ConfigError) as error:
        hp.load(tmp_path / "it")
    assert str(error.value).startswith(f"model.path: {tmp_path}")
    assert message in str(error.value)
    capfd.readouterr()
    assert main(["train", "--model.path", str(tmp_path / "it")]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it"]  # no run, and no code has run


def step(folder: Path) -> float:
    schedule = hp.build_schedule("1f1b", ranks=1, layers=LAYERS, microbatches=1)
    return hp.Pipeline(hp.load(folder), schedule).step(
        torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named_when_it_is_read(number: float, tmp_path: Path) -> None:
    saved(tmp_path, "llama", torch.float32, attention_bias=False)
    weights(fill(number))(tmp_path)
    with pytest.raises(ConfigError) as error:
        step(tmp_path)
    assert f"model.safetensors: {GATE} is not finite; give weights without nan and inf" in str(error.value)


def test_a_tied_table_that_is_stored_twice_and_differs(tmp_path: Path) -> None:
    saved(tmp_path, "llama", torch.float32, attention_bias=False)  # untied
    change_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ConfigError) as error:
        step(tmp_path)
    assert "lm_head.weight is not model.embed_tokens.weight, and tie_word_embeddings says that it is" in str(
        error.value
    )
    weights(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(20, 16)}))(tmp_path)
    with pytest.raises(ConfigError) as error:
        hp.load(tmp_path)
    assert (
        "lm_head.weight is [20, 16], and tie_word_embeddings says that it is the embedding's table of [19, 16]"
        in str(error.value)
    )


TRAIN: list[tuple[list[str], str]] = [
    (["--model.name", "tiny"], "model.path: 'it', and model.name is 'tiny'; leave one of them out"),
    (["--model.layers", "2"], "model.layers: 2, and the weights in model.path are of 4; leave it out: only rope, rope_base,"),
    (["--model.norm", "layer"], "model.norm: layer, and the weights in model.path are of rms; leave it out"),
    (["--model.window", "5"], "model.window: 5; no config of llama can say so"),
    (["--mesh.tp", "3"], "mesh.tp: 3 "),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), TRAIN, ids=[arguments[0] for arguments, _ in TRAIN])
def test_keys_that_the_weights_decide(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "it", "llama", torch.float32, attention_bias=False, vocab_size=256)
    capfd.readouterr()
    assert main(["train", "--model.path", "it", *arguments]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"helixpipe: error: {message}")


def test_commands_take_a_folder_or_its_config_where_they_take_a_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weights are needed to predict."""
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "it", "llama", torch.float32, attention_bias=False)
    no_weights(tmp_path / "it")
    setting = ["--ranks", "2", "--microbatches", "4", "--sequence-length", "64", "--json"]
    told = []
    for model in ("it", "it/config.json", str(tmp_path / "it")):
        capfd.readouterr()
        assert main(["simulate", "1f1b", *setting, "--model", model]) == 0
        told.append(json.loads(capfd.readouterr().out)["step_s"])
    assert len(set(told)) == 1
    schedule = hp.build_schedule("1f1b", ranks=2, layers=LAYERS, microbatches=4)
    assert hp.simulate(schedule, "it", sequence_length=64).makespan_s == pytest.approx(told[0])
    assert config_of(tmp_path / "it")["num_hidden_layers"] == LAYERS
    for model, message in (
        (
            "./nowhere",
            "--model: nowhere: no such file or folder; give a folder that transformers' save_pretrained wrote",
        ),
        ("lama3-8b", "--model: 'lama3-8b' is not known; did you mean 'llama3-8b'?"),
    ):
        assert main(["simulate", "1f1b", *setting, "--model", model]) == 2
        assert capfd.readouterr().err == f"helixpipe: error: {message}\n"
