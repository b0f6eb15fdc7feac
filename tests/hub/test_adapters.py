"""LoRA out and in: PEFT loads what is exported and has our loss, merged or not, and we load what PEFT saved.

transformers computes RMSNorm and rotary tables in float32: losses agree to 1e-6 of a nat, GPT-2's to float64's last bits.
"""

from __future__ import annotations

import itertools
import json
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved import LAYERS, batch, class_of, hugging_face, loss_of, saved

import helixpipe as hp
from helixpipe.cli import main
from helixpipe.config_text import build_config
from helixpipe.errors import ConfigError
from helixpipe.train.checkpoint import Checkpoints

ALL = ("q", "k", "v", "o", "gate", "up", "down")
CASES: dict[str, hp.Lora] = {
    "llama": hp.Lora(3, 6.0, ALL),
    "qwen3": hp.Lora(2, 5.0, ("q", "v"), rslora=True),
    "gemma2": hp.Lora(2, 0.0, ("o", "up")),
    "olmo2": hp.Lora(2, 3.0, ("k", "down")),
    "phi3": hp.Lora(2, 4.0, ("o", "down")),
    "gpt2": hp.Lora(2, 4.0, ("o", "up", "down")),
}


def peft_of(model: Any, folder: Path) -> Any:
    hugging_face()
    peft = pytest.importorskip("peft", reason="PEFT IS NOT INSTALLED, so that nobody but us has read our adapters")
    return peft.PeftModel.from_pretrained(model, folder).eval()


def drawn(model: hp.Decoder) -> dict[str, torch.Tensor]:
    """A model's parameters, with adapters of which none is 0."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for part in model.shape.chain():
        for place, parameter in model.part(part).named_parameters():
            name = model.shape.parameter_name(part, place)
            value = parameter.detach().double()
            if "lora_b" in name:
                value = 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
            found[name] = value
    return found


def run_of(folder: Path, base: Path, lora: hp.Lora, **keys: Any) -> Path:
    """A run with one checkpoint, as one rank saves it."""
    table = {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets), "rslora": lora.rslora}
    config = build_config({
        "schedule": {"family": "1f1b", "ranks": 1}, "model": {"path": str(base)} | keys,
        "train": {"sequence_length": 16, "lora": table},
    })  # fmt: skip
    state = {f"model.{name}": value for name, value in drawn(hp.load(base, lora=lora)).items()}
    Checkpoints(folder / "checkpoints", 1, None).save(state, 1, config)
    return folder


def ours(model: hp.Decoder) -> float:
    schedule = hp.build_schedule("1f1b", ranks=1, layers=LAYERS, microbatches=4)
    return hp.Pipeline(model, schedule, dtype=torch.float64).evaluate(*batch())


@pytest.mark.parametrize("name", CASES)
def test_what_is_exported_has_our_loss_everywhere(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "base", name)
    run = run_of(tmp_path / "run", tmp_path / "base", CASES[name])
    found = hp.export(run, tmp_path / "adapter")
    again = hp.load(tmp_path / "base", adapter=tmp_path / "adapter")
    assert again.shape.lora == CASES[name]
    here, written = drawn(hp.load(tmp_path / "base", lora=CASES[name])), {
        again.shape.parameter_name(part, place): p.detach()
        for part in again.shape.chain() for place, p in again.part(part).named_parameters()
    }  # fmt: skip
    assert here.keys() == written.keys()
    assert all(torch.equal(value, written[each]) for each, value in here.items())
    count = sum(value.numel() for each, value in here.items() if "lora" in each)
    assert (found.parameters, found.dtype, found.files, found.adapter) == (count, "float64", 1, True)

    plain, loss = loss_of(model), ours(again)
    assert abs(loss - plain) > 1e-3
    hp.export(run, tmp_path / "merged", merge=True)
    whole = class_of(name).from_pretrained(tmp_path / "merged", dtype=torch.float64, attn_implementation="eager")
    close = 1e-12 if name == "gpt2" else 1e-6
    assert loss_of(whole.eval()) == pytest.approx(loss, abs=close)
    theirs = peft_of(model, tmp_path / "adapter")
    assert loss_of(theirs) == pytest.approx(loss, abs=close)
    with torch.no_grad():
        logits, of_merged = (each(input_ids=batch()[0]).logits for each in (theirs, whole))
    assert (logits - of_merged).abs().max() < 1e-9
    assert sum(p.numel() for each, p in theirs.named_parameters() if "lora" in each) == count


def test_what_peft_saved_is_read(tmp_path: Path) -> None:
    """Of a pattern, of names; in bfloat16 the same numbers."""
    hugging_face()
    peft = pytest.importorskip("peft", reason="PEFT IS NOT INSTALLED, so that we have read no adapter but our own")
    for targets, expected in (("all-linear", ALL), (["q_proj", "mlp.down_proj"], ("q", "down"))):
        model = saved(tmp_path / "base", "llama")
        theirs = peft.get_peft_model(
            model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", use_rslora=True)
        )
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                if "lora_" in name:
                    p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        theirs.save_pretrained(tmp_path / "adapter")
        found = hp.load(tmp_path / "base", adapter=tmp_path / "adapter")
        assert found.shape.lora == hp.Lora(4, 6.0, expected, rslora=True)
        assert ours(found) == pytest.approx(loss_of(theirs.eval()), abs=1e-6)


def test_a_run_trains_adapters_goes_on_and_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through the commands, on two ranks in bfloat16: an interrupted run is the uninterrupted one bit by bit, weights are those
    of the folder, and training goes on from what was exported with another schedule.
    """
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(1 + i * i % 18 for i in range(4000)))
    saved(tmp_path / "base", "llama", torch.bfloat16, vocab_size=256)
    common = [
        "train", "--model.path", "base", "--data.path", str(text), "--train.sequence_length", "16", "--run.timeline_step", "0",
        "--schedule.microbatches", "4", "--train.warmup_steps", "1", "--runtime.dtype", "bfloat16", "--run.checkpoint_every", "1",
        "--train.evaluate_every", "0", "--train.evaluate_sequences", "1", "--train.learning_rate", "0.01", "--run.keep", "4",
        "--schedule.segment_multiple", "4",
    ]  # fmt: skip
    lora = ["--train.lora.rank", "4", "--train.lora.alpha", "8", "--train.lora.targets", "q,v,o,up"]
    assert main([*common, *lora, "--schedule.travel", "attention", "--train.steps", "3", "--run.folder", "whole"]) == 0
    assert "base: 18,256 parameters (2,048 trained), 4 layers" in capfd.readouterr().err
    assert main(["train", "--resume", "whole/checkpoints/step-00000002", "--run.folder", "again"]) == 0
    capfd.readouterr()
    for run in ("whole", "again"):
        assert main(["export", run, f"{run}-adapter", "--json"]) == 0
        told = json.loads(capfd.readouterr().out)
        assert (told["adapter"], told["step"], told["dtype"]) == (True, 3, "float32")
    assert (
        main(["train", "--resume", "whole", "--train.steps", "4", "--train.lora.rank", "8", "--run.folder", "other"])
        == 2
    )
    said = capfd.readouterr().err
    assert (
        'its train.lora is rank 4, alpha 8.0, targets ["q", "v", "o", "up"], rslora false, and the config\'s rank 8'
        in said
    )
    one, other = (load_file(tmp_path / f"{run}-adapter" / "adapter_model.safetensors") for run in ("whole", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(one) == 2 * 4 * LAYERS
    assert all(value.any() for value in one.values())
    said_of = json.loads((tmp_path / "whole-adapter" / "adapter_config.json").read_text())
    assert (said_of["base_model_name_or_path"], said_of["r"], said_of["lora_alpha"], said_of["target_modules"]) == (
        str(tmp_path / "base"), 4, 8, ["o_proj", "q_proj", "up_proj", "v_proj"],
    )  # fmt: skip

    assert main(["export", "whole", "merged", "--merge"]) == 0
    assert capfd.readouterr().out.startswith("merged: llama, ")
    base, merged = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    assert base.keys() == merged.keys()
    for name, value in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in one:
            assert torch.equal(value, merged[name])
            continue
        product = 2.0 * one[f"{key}.lora_B.weight"] @ one[f"{key}.lora_A.weight"]
        assert torch.equal(merged[name], (value.float() + product).bfloat16())

    held = ["--data.path", str(text), "--train.sequence_length", "16", "--schedule.family", "1f1b", "--schedule.ranks", "1",
            "--train.evaluate_sequences", "2", "--runtime.dtype", "float64", "--json"]  # fmt: skip
    assert main(["export", "whole", "wide", "--merge", "--dtype", "float64"]) == 0
    capfd.readouterr()
    told = []
    for model in (["--model.path", "base", "--model.adapter", "whole-adapter"], ["--model.path", "wide"]):
        assert main(["evaluate", *model, *held]) == 0
        told.append(json.loads(capfd.readouterr().out))
    assert [each["weights"] for each in told] == ["base with whole-adapter", "wide"]
    assert told[0]["loss"] == pytest.approx(told[1]["loss"], abs=1e-6)  # the sum is made in float32

    on = [
        *common,
        "--model.adapter",
        "whole-adapter",
        "--schedule.family",
        "seq1f1b",
        "--schedule.segments",
        "2",
        "--schedule.ranks",
        "1",
    ]
    assert main([*on, "--train.steps", "1", "--run.folder", "on", "--train.learning_rate", "0"]) == 0
    assert main(["export", "on", "on-adapter"]) == 0
    on_again = load_file(tmp_path / "on-adapter" / "adapter_model.safetensors")
    assert all(torch.equal(one[name], on_again[name]) for name in one)
    assert main([*on, "--train.lora.rank", "8"]) == 2
    assert "train.lora.rank: 8, and the adapter in model.adapter has 4; leave it out" in capfd.readouterr().err


def test_what_no_adapter_can_say_is_not_exported_as_one(tmp_path: Path) -> None:
    saved(tmp_path / "phi", "phi3")
    run = run_of(tmp_path / "fused", tmp_path / "phi", hp.Lora(2, targets=("q",)))
    with pytest.raises(ConfigError) as error:
        hp.export(run, tmp_path / "out")
    assert str(error.value) == (
        "train.lora.targets: q, and phi3 has q, k, v in one matrix, qkv_proj, of which PEFT has no adapter for a piece; "
        "export the whole model with --merge"
    )
    whole = class_of("phi3").from_pretrained(hp.export(run, tmp_path / "out", merge=True).folder, dtype=torch.float64)
    values = drawn(hp.load(tmp_path / "phi", lora=hp.Lora(2, targets=("q",))))
    at = "layers.1.qkv.q"
    expected = values[f"{at}.weight"] + values[f"{at}.lora_b.weight"] @ values[f"{at}.lora_a.weight"]
    torch.testing.assert_close(whole.model.layers[1].self_attn.qkv_proj.weight[:16], expected, rtol=0, atol=1e-14)

    saved(tmp_path / "llama", "llama")
    rope = {"type": "linear", "factor": 2.0}
    run = run_of(tmp_path / "stretched", tmp_path / "llama", hp.Lora(2), rope=rope)
    with pytest.raises(ConfigError, match=r"^model\.rope: not as in .*; export the whole model with --merge$"):
        hp.export(run, tmp_path / "two")
    own = {
        "layers": 2,
        "hidden": 16,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 4,
        "ffn": 24,
        "vocabulary": 19,
        "name": "qwen3-8b",
    }
    config = build_config({"schedule": {"family": "1f1b", "ranks": 1}, "model": own, "train": {"lora": {"rank": 2}}})
    state = {f"model.{name}": value for name, value in drawn(hp.Decoder(config.shape())).items()}
    Checkpoints(tmp_path / "own" / "checkpoints", 1, None).save(state, 1, config)
    with pytest.raises(
        ConfigError, match="its weights came from no folder, and adapters belong to one; export the whole"
    ):
        hp.export(tmp_path / "own", tmp_path / "three")
    assert hp.export(tmp_path / "own", tmp_path / "three", merge=True).architecture == "qwen3"
    state = {f"model.{name}": value for name, value in drawn(hp.load(tmp_path / "llama")).items()}
    config = build_config({"schedule": {"family": "1f1b", "ranks": 1}, "model": {"path": str(tmp_path / "llama")},
                           "train": {"sequence_length": 16}})  # fmt: skip
    Checkpoints(tmp_path / "plain" / "checkpoints", 1, None).save(state, 1, config)
    with pytest.raises(ConfigError, match=r"^--merge: .* has no adapters; leave it out$"):
        hp.export(tmp_path / "plain", tmp_path / "four", merge=True)


def says(**keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)

    return apply


AT = "base_model.model.model.layers.2.self_attn"
BAD: list[tuple[str, Callable[[Path], None], str]] = [
    ("no config", lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json in it; give a folder that"),
    ("no weights", lambda folder: (folder / "adapter_model.safetensors").unlink(), "neither adapter_model.safetensors nor"),
    ("another kind", says(peft_type="LOHA"), 'peft_type: "LOHA"; only LORA is known'),
    ("dora", says(use_dora=True), "use_dora: true is not known here: it may change what is computed"),
    ("whole modules", says(modules_to_save=["lm_head"]), 'modules_to_save: ["lm_head"] is not known here'),
    ("biases", says(bias="all"), 'bias: "all"; biases are not trained here, only none is known'),
    ("ranks that differ", says(rank_pattern={"q_proj": 8}), 'rank_pattern: {"q_proj": 8} is not known here'),
    ("dropout", says(lora_dropout=0.1), "lora_dropout: 0.1 is not known here: nothing is dropped here; set it to 0"),
    ("turned", says(fan_in_fan_out=True), "fan_in_fan_out: true, and llama's weights are [out, in]; set it to false"),
    ("changed weights", says(init_lora_weights="pissa"), 'init_lora_weights: "pissa" may change the weights beside it'),
    ("no rank", says(r=0), "r: 0, with lora_alpha 2; both are more than 0"),
    ("another rank", says(r=5), "is [2, 16], and of this model and r 5 it is [5, 16]; give the adapter that belongs to"),
    ("a layer less", tensors(lambda t: t.pop(f"{AT}.q_proj.lora_B.weight")),
     f"{AT}.q_proj.lora_B.weight is missing; every layer must have the same adapters"),
    ("another layer", tensors(lambda t: t.update({f"{AT}.w_proj.lora_A.weight": torch.zeros(2, 16)})),
     f"{AT}.w_proj.lora_A.weight is of no linear layer that can have an adapter in llama"),
    ("the head", tensors(lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 16)})),
     "base_model.model.lm_head.lora_A.weight is of no linear layer that can have an adapter in llama"),
    ("nothing", tensors(lambda t: t.clear()), "no adapter is in its weights; give a folder that PEFT's"),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    saved(folder / "base", "llama")
    hp.export(run_of(folder / "run", folder / "base", hp.Lora(2)), folder / "adapter")
    return folder


@pytest.mark.parametrize(("name", "spoil", "message"), BAD, ids=[name for name, *_ in BAD])
def test_what_is_no_adapter_of_these_weights_is_one_line(
    name: str,
    spoil: Callable[[Path], None],
    message: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in (base / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    spoil(folder)
    assert main(["train", "--model.path", str(base / "base"), "--model.adapter", str(folder)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "model.adapter: " in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.lora.rank", "0"], "train.lora.rank: 0; give at least 1"),
        (["--train.lora.alpha", "8"], "train.lora.rank: unset, and train.lora.alpha is set; give a rank, such as 16"),
        (["--train.lora.rank", "2", "--train.lora.targets", "q,w"],
         "train.lora.targets: 'w' is no linear layer; known: q, k, v, o, gate, up, down"),
        (["--train.lora.dropout", "0.1"], "train.lora.dropout: no such key"),
        (["--model.adapter", "there"], "model.adapter: 'there' belongs to weights in a folder; give model.path too"),
        (["--train.lora.rank", "2", "--train.freeze", "*lora*"], "train.freeze: *lora* are all parameters, and nothing is left"),
    ],
)  # fmt: skip
def test_bad_keys_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_the_guides_config_is_one(base: Path) -> None:
    lines = (Path(__file__).parents[2] / "docs/guide/fine_tuning.md").read_text().split("# tune.toml\n")[1].splitlines()
    text = "\n".join(itertools.takewhile(lambda line: not line.startswith("    helixpipe"), lines))
    table = tomllib.loads(textwrap.dedent(text))
    table["model"]["path"] = str(base / "base")
    assert build_config(table).shape().lora == hp.Lora(16, 32.0, ("q", "k", "v", "o"))


def test_an_adapter_and_a_new_one_exclude_each_other(base: Path) -> None:
    with pytest.raises(ConfigError, match="lora: an adapter is given, which says what it is; leave one of them out"):
        hp.load(base / "base", adapter=base / "adapter", lora=hp.Lora(2))
