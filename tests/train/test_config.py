"""Configs: what is read is what was written, and every mistake is one line that names the key."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from helixpipe.config import Config, ModelConfig
from helixpipe.config_lora import LoraConfig
from helixpipe.config_rope import RopeConfig
from helixpipe.config_text import (
    build_config,
    merged,
    parse_arguments,
    read_saved,
    read_toml,
    renewed,
    to_table,
    write_toml,
)
from helixpipe.errors import ConfigError
from helixpipe.parts.lora import Lora
from helixpipe.parts.rotary import TYPES, Rotary
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.shapes import SHAPES
from helixpipe.schedule.partition import even
from helixpipe.train import main

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_written_config_reads_back_the_same() -> None:
    table = {"model": {"name": "gpt2", "layers": 3, "qk_norm": True}, "train": {"betas": [0.8, 0.9], "clip_norm": 2}}
    for config in (Config(), build_config(table)):
        assert build_config(tomllib.loads(write_toml(config))) == config


def test_every_field_of_a_shape_can_be_changed() -> None:
    keys = {field.name for field in dataclasses.fields(ModelConfig)}
    # what is frozen, and what stands beside it, is no shape of a model: train.freeze and train.lora say it
    assert keys == {field.name for field in dataclasses.fields(ModelShape)} - {"frozen", "lora"} | {
        "name",
        "path",
        "adapter",
    }


def test_every_key_of_a_rotary_scaling_and_of_adapters_can_be_given() -> None:
    for kind, config in ((Rotary, RopeConfig), (Lora, LoraConfig)):
        assert {f.name for f in dataclasses.fields(config)} == {f.name for f in dataclasses.fields(kind)}
    assert set(get_args(get_args(get_type_hints(RopeConfig)["type"])[0])) == set(TYPES)


def test_the_model_is_the_named_shape_with_changes() -> None:
    assert Config().shape() == SHAPES["tiny"]
    shape = build_config({"model": {"name": "llama3-8b", "layers": 2, "vocabulary": 300}}).shape()
    assert shape == dataclasses.replace(SHAPES["llama3-8b"], layers=2, vocabulary=300)


def test_the_example_spells_out_the_defaults() -> None:
    table = read_toml(EXAMPLES / "tiny.toml")
    assert build_config(table) == dataclasses.replace(
        Config(),
        model=dataclasses.replace(Config().model, name="tiny"),
        schedule=dataclasses.replace(Config().schedule, folds=2, travel="none", groups="sequential"),
    )
    for section, keys in to_table(Config()).items():
        assert keys.items() <= table[section].items(), section


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[train]\nsteps = 5\nseed = 3\n[schedule]\nfolds = 1\n")
    given = parse_arguments(
        [str(file), "--train.steps", "7", "--train.learning-rate=1e-4", "--train.betas", "0.8", "0.9"]
    )
    config = build_config(merged(read_toml(file), given.overrides))
    assert (config.train.steps, config.train.seed, config.train.learning_rate) == (7, 3, 1e-4)
    assert config.train.betas == (0.8, 0.9)
    assert config.schedule.folds == 1


@pytest.mark.parametrize(("device", "used", "kernels"), [
    ("cpu", "", "cpu"), ("cuda", "", "cuda"), ("auto", "", "cpu"), ("auto", "cuda:1", "cuda"), ("auto", "cpu", "cpu"),
])  # fmt: skip
def test_predictions_are_of_the_device_that_is_used(device: str, used: str, kernels: str) -> None:
    assert build_config({"runtime": {"device": device}}).setting(used).keeping.device == kernels


def test_another_family_does_not_inherit_options() -> None:
    base = {"schedule": {"family": "helix", "folds": 1, "ranks": 4}}
    assert merged(base, {"schedule": {"family": "1f1b"}}) == {"schedule": {"family": "1f1b", "ranks": 4}}
    assert merged(base, {"schedule": {"family": "helix"}})["schedule"]["folds"] == 1


def test_a_head_that_weighs_layers_takes_layers_from_its_rank() -> None:
    small = build_config({"schedule": {"family": "1f1b"}, "model": {"layers": 6}}).build_schedule()
    large = build_config({"schedule": {"family": "1f1b"}, "model": {"layers": 6, "vocabulary": 8192}}).build_schedule()
    assert [len(stage.parts) for stage in small.stages] == [16, 16]  # three layers each, and embed or head
    assert [len(stage.parts) for stage in large.stages] == [26, 6]


@pytest.mark.parametrize(("partition", "lengths"), [("even", (384, 256, 384)), ("computation_wise", (384, 384, 256))])
def test_segments_are_cut_by_computation_or_evenly(partition: str, lengths: tuple[int, ...]) -> None:
    table = {"schedule": {"family": "seq1f1b", "segments": 3, "partition": partition}}
    config = build_config(table)
    assert config.segment_lengths(config.build_schedule()) == lengths
    assert Config().segment_lengths(Config().build_schedule()) is None


def test_slimpipe_cuts_evenly_unless_asked_otherwise() -> None:
    table = {"schedule": {"family": "slimpipe", "segments": 4}, "train": {"sequence_length": 4096}}
    config = build_config(table)
    assert config.segment_lengths(config.build_schedule()) == even(4096, 4)
    asked = build_config({**table, "schedule": {**table["schedule"], "partition": "computation_wise"}})
    assert asked.segment_lengths(asked.build_schedule()) == asked.setting().segment_lengths(4) != even(4096, 4)
    with pytest.raises(
        ConfigError, match=r"^schedule.evenness: 0.5 moves cuts of equal computation, and these are even"
    ):
        build_config({**table, "schedule": {**table["schedule"], "evenness": 0.5}})


@pytest.mark.parametrize(
    ("arguments", "path", "resume"),
    [
        (["--resume"], None, "auto"),
        (["--resume", "a.toml"], "a.toml", "auto"),
        (["a.toml", "--resume"], "a.toml", "auto"),
        (["--resume", "--train.steps", "3"], None, "auto"),
        (["--resume", "runs/a-1"], None, "runs/a-1"),
        (["a.toml", "--resume=b"], "a.toml", "b"),
    ],
)
def test_resume_is_bare_or_has_a_path(arguments: list[str], path: str | None, resume: str) -> None:
    given = parse_arguments(arguments)
    assert given.path == path
    assert given.overrides["run"]["resume"] == resume


@pytest.mark.parametrize("arguments", [["--resume", ""], ["--resume="], ["--resume", "", "a.toml"]])
def test_an_empty_path_to_resume_is_no_new_run(arguments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(arguments)
    assert str(caught.value) == "--resume: no path is given; name a run folder or a checkpoint, or write --resume alone"


REPLACED = "no such key any more; train.evaluate_sequences took its place: held-out sequences in an evaluation, whatever a batch is"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.step", "3"], "--train.step: no such key; did you mean 'steps'?"),
        (["--train.evaluate_batches", "3"], f"--train.evaluate_batches: {REPLACED}"),
        (["--trian.steps", "3"], "--trian: no such section; did you mean 'train'?"),
        (["--config", "a.toml"], "--config: a config file has no flag; write a.toml by itself"),
        (["--config-file=a.toml"], "--config-file: a config file has no flag; write a.toml by itself"),
        (["--config", "--train.steps", "3"], "--config: a config file has no flag; write FILE.toml by itself"),
        (["--steps", "3"], "--steps: a key needs its section; did you mean '--train.steps'?"),
        (["--train.steps", "many"], "--train.steps: 'many' will not do; give a whole number"),
        (["--train.steps", "2.5"], "--train.steps: '2.5' will not do; give a whole number"),
        (["--train.steps"], "--train.steps: no value; give a whole number"),
        (["--train.betas", "0.9"], "--train.betas: [0.9] will not do; give 2 numbers"),
        (["--model.tied", "yes"], "--model.tied: 'yes' will not do; give true or false"),
        (["--runtime.dtype", "bf16"], "--runtime.dtype: 'bf16' is not known; did you mean 'bfloat16'?"),
        (
            ["a.toml", "b.toml"],
            "'b.toml': one config file is enough, and 'a.toml' is given; write keys as --section.key value",
        ),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nstep = 3", "train.step: no such key; did you mean 'steps'?"),
        ("[train]\nevaluate_batches = 3", f"train.evaluate_batches: {REPLACED}"),
        ("[trian]\nsteps = 3", "trian: no such section; did you mean 'train'?"),
        ("train = 3", "train: a section, not a value; write keys under [train]"),
        ("[train]\nsteps = 'many'", "train.steps: 'many' will not do; give a whole number"),
        ("[train]\nsteps = true", "train.steps: true will not do; give a whole number"),
        ("[train]\nlearning_rate = [1]", "train.learning_rate: [1] will not do; give a number"),
        ("[model]\nnorm = 'batch'", "model.norm: 'batch' is not known; known: rms, layer"),
        ("[train\n", "not TOML: Expected ']' at the end of a table declaration (at line 1, column 7)"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_toml(file)
    assert str(caught.value) == f"{file}: {message}"


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^nowhere\.toml: cannot be read: No such file or directory; give the path"):
        read_toml("nowhere.toml")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"model": {"name": "tinny"}}, "model.name: 'tinny' is not known; did you mean 'tiny'?"),
        (
            {"model": {"heads": 3}},
            "model.heads: 3 heads do not divide hidden size 128; choose a divisor or set model.head_dim",
        ),
        ({"model": {"kv_heads": -1}}, "model.kv_heads: -1; give at least 0"),
        ({"model": {"head_dim": -32}}, "model.head_dim: -32; give at least 0"),
        ({"model": {"context": -1}}, "model.context: -1; give at least 0"),
        ({"model": {"norm_eps": -1e-5}}, "model.norm_eps: -1e-05; give at least 0"),
        (
            {"model": {"name": "gpt2", "norm_offset": True}},
            "model.norm_offset: true, and a LayerNorm multiplies by its weight alone; set model.norm to rms or leave it away",
        ),
        (
            {"model": {"qk_norm_over": "width"}},
            "model.qk_norm_over: 'width', and q and k have no norm; set model.qk_norm to true or leave it away",
        ),
        ({"model": {"embed_scale": 0.0}}, "model.embed_scale: 0; give more than 0, and a finite number"),
        (
            {"model": {"qk_norm": True, "qk_norm_over": "width"}, "mesh": {"tp": 2}},
            "mesh.tp: 2 ranks divide the heads, and model.qk_norm_over 'width' needs all of them together; use tp 1",
        ),
        ({"model": {"rope_base": 0.0}}, "model.rope_base: 0; give more than 0"),
        (
            {"model": {"causal": False}},
            "model.causal: false, and a bidirectional model sees the token that next_token asks for; set train.objective to "
            "masked or masked_diffusion, or model.causal to true",
        ),
        ({"schedule": {"family": "helx"}}, "schedule.family: 'helx' is not known; did you mean 'helix'?"),
        (
            {"schedule": {"family": "1f1b", "folds": 2}},
            "schedule.folds: 1f1b has no such option, helix has; remove the key",
        ),
        (
            {"schedule": {"family": "1f1b", "ranks": 6}},
            "schedule.ranks: 4 layers cannot fill 6 stages; use at most 4 ranks",
        ),
        (
            {"schedule": {"family": "interleaved", "stages_per_rank": 3}},
            "schedule.stages_per_rank: 4 layers cannot fill 2 ranks of 3 stages each; use at most 2",
        ),
        (
            {"schedule": {"family": "interleaved", "ranks": 6, "stages_per_rank": 2}},
            "schedule.ranks: 4 layers cannot fill 6 ranks of 2 stages each; use at most 2 ranks",
        ),
        (
            {"schedule": {"family": "interleaved", "ranks": 6, "stages_per_rank": 10**12}},
            "schedule.ranks: 4 layers cannot fill 6 ranks of 1000000000000 stages each; use a model of at least "
            "1000000000000 layers",
        ),
        (
            {"schedule": {"family": "seq1f1b", "segments": 10**9}},
            "schedule.segments: 1000000000 segments of a sequence of 1024 tokens; give at most 1024",
        ),
        (
            {"schedule": {"family": "seq1f1b", "segments": 9}, "train": {"sequence_length": 8}},
            "schedule.segments: 9 segments of a sequence of 8 tokens; give at most 8",
        ),
        (
            {"schedule": {"family": "seq1f1b", "segments": 9}},
            "schedule.segments: 9 segments of at least 128 tokens are more than the sequence's 1024; give at most 8 "
            "segments, or a schedule.segment_multiple of at most 113",
        ),
        (
            {"schedule": {"family": "seq1f1b", "segments": 2}, "model": {"causal": False}},
            "schedule.segments: 2 segments need causal attention (model.causal), since the first segments run before the "
            "keys of later ones exist; use segments = 1, or the helix family, which splits no sequence",
        ),
        ({"schedule": {"folds": 0}}, "schedule.folds: 0; give at least 1 (1 is the naive order, 2 the two-fold)"),
        ({"schedule": {"ranks": 0}}, "schedule.ranks: 0; give at least 1"),
        ({"train": {"steps": 0}}, "train.steps: 0; give at least 1"),
        ({"train": {"betas": [0.9, 1.0]}}, "train.betas: 1.0; give two numbers from 0 to below 1"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate: nan will not do; give a finite number"),
        (
            {"train": {"min_learning_rate": 1.0}},
            "train.min_learning_rate: 1.0 is above train.learning_rate 0.002; lower it",
        ),
        (
            {"train": {"schedule": "constant", "min_learning_rate": 1e-4}},
            "train.min_learning_rate: a constant schedule never falls; remove the key",
        ),
        ({"train": {"decay_steps": 4}}, "train.decay_steps: cosine has no such key, wsd has; remove it"),
        (
            {"train": {"schedule": "wsd", "decay_steps": 121}},
            "train.decay_steps: 121 are more than train.steps 120; lower it",
        ),
        ({"train": {"schedule": "wsd", "decay_steps": 0}}, "train.decay_steps: 0; give at least 1"),
        ({"train": {"schedule": "wds"}}, "train.schedule: 'wds' is not known; did you mean 'wsd'?"),
        ({"train": {"z_loss": -1e-4}}, "train.z_loss: -0.0001; give at least 0"),
        ({"mesh": {"tp": 3}}, "mesh.tp: 3 ranks do not divide model.heads 4; tp may be 1, 2 or 4"),
        ({"mesh": {"dp": 0}}, "mesh.dp: 0; give at least 1"),
        (
            {"mesh": {"cp": 3}},
            "train.sequence_length: 1024 tokens do not divide for ring over cp 3, tp 1, whose zigzag layout needs a "
            "multiple of 6; use 1020 or 1026",
        ),
        (
            {"mesh": {"cp": 3}, "schedule": {"family": "seq1f1b", "segments": 2}, "train": {"sequence_length": 1020}},
            "schedule.segment_multiple: segments of 640, 380 tokens do not divide for ring over cp 3, tp 1, whose zigzag "
            "layout needs multiples of 6; set it to 6 or a multiple of that",
        ),
        (
            {"mesh": {"cp": 8, "context_method": "ulysses"}},
            "mesh.context_method: ulysses divides the heads of a rank, 4, over cp 8; cp may be 1, 2 or 4, or use ring",
        ),
        ({"data": {"held_out": 1.0}}, "data.held_out: 1.0; give a share below 1, such as 0.1"),
        ({"runtime": {"port": 70000}}, "runtime.port: 70000; give at most 65535"),
        ({"runtime": {"timeout_s": 0}}, "runtime.timeout_s: 0.0; give more than 0"),
        ({"runtime": {"timeout_s": 1e14}}, "runtime.timeout_s: 100000000000000.0; give at most 100000000"),
        (
            {"model": {"name": "gpt2"}, "train": {"sequence_length": 2048}},
            "train.sequence_length: 2048 tokens, and learned positions have room for 1024; "
            "shorten it or raise model.context",
        ),
    ],
)  # fmt: skip
def test_a_value_or_combination_that_cannot_be_is_one_line(table: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(table)
    assert str(caught.value) == message


def test_help_names_every_key_with_its_meaning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for section, keys in dataclasses.asdict(Config()).items():
        for key, value in keys.items():
            for name in [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]:
                assert f"--{section}.{name} " in shown, name
    assert "Sequences in a micro-batch." in shown
    assert "--data.document_mask {true,false}" in shown
    assert "--run.checkpoint_async {true,false}" in shown
    told = "Without a config file, the config saved with it holds, and options go before it; with one, nothing of the saved config does."
    assert told in " ".join(shown.split())


@pytest.mark.timeout(60)
def test_config_and_checks_do_not_import_torch() -> None:
    code = (
        "import sys, helixpipe.config, helixpipe.train, helixpipe.train.job, helixpipe.train.launch;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_config_that_an_earlier_version_saved_is_read(tmp_path: Path) -> None:
    """With as many held-out sequences as its batches were; a file that a user wrote is refused (above)."""
    config = build_config({"train": {"microbatch_size": 3}, "schedule": {"microbatches": 8}})
    table = to_table(config)
    assert renewed(table) == table
    del table["train"]["evaluate_sequences"], table["mesh"]  # the mesh came later than batches
    table["train"]["evaluate_batches"] = 2
    assert build_config(renewed(table)).train.evaluate_sequences == 2 * 3 * 8
    assert table["train"]["evaluate_batches"] == 2, "what was given stays as it is"
    path = tmp_path / "config.toml"
    path.write_text(write_toml(config).replace("evaluate_sequences = 16", "evaluate_batches = 2"))
    assert read_saved(path)["train"]["evaluate_sequences"] == 48
    path.write_text("train = 3")
    with pytest.raises(ConfigError, match=r"config.toml: train: a section, not a value; write keys under \[train\]$"):
        read_saved(path)
