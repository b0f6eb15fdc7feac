"""`--data`: simulate, plan and compare price the documents that training reads, and every way it can be asked wrongly."""

from __future__ import annotations

import re
import statistics
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from making import prepare, write_lines, write_tokenizer
from real_data import LENGTH, SIZES, asked, documents_of, setting
from test_layering import imported_by
from tokenizers import models, pre_tokenizers

from helixpipe.cli import main
from helixpipe.config_text import build_config, read_toml, write_toml
from helixpipe.errors import ConfigError
from helixpipe.parts.shapes import SHAPES
from helixpipe.parts.work import Batch
from helixpipe.predict.estimate import estimate
from helixpipe.predict.hardware import named_accelerator
from helixpipe.predict.profile import Profile
from helixpipe.predict.simulate import simulate_program
from helixpipe.predict.steps import percentile, price_step, step_batches
from helixpipe.predict.timeline_text import to_json
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower


@pytest.mark.parametrize("family", ["1f1b", "seq1f1b --segments 2"])
def test_one_document_a_sequence_is_the_plain_command_to_the_digit(
    family: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = asked(capsys, f"simulate {family} {SIZES} --dp 3")
    for packing in ("windows", "documents", "balanced"):
        found = asked(capsys, f"simulate {family} {SIZES} --dp 3 --data {folders['whole']} --packing {packing}")
        data = found.pop("data")
        assert found == plain
        for name in ("step_s", "ideal_s", "tokens_per_s", "bubble_ratio"):
            assert data[name] == {"mean": plain[name], "p95": plain[name]}
        assert data["peak_bytes"] == max(rank["peak_bytes"] for rank in plain["ranks"])
        assert data["padding_share"] == 0
        assert data["imbalance"] == {"mean": 1, "p95": 1}


def test_each_step_is_priced_with_the_batches_that_training_lowers(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = asked(
        capsys, f"simulate seq1f1b --segments 2 {SIZES} --data {folders['tailed']} --packing documents --steps 3"
    )
    family = setting().of_family("seq1f1b")
    schedule = family.build("seq1f1b", 2, 4, segments=2)
    steps = documents_of(folders["tailed"], 3)
    assert len(set(steps)) == 3
    for each, documents in zip(found["data"]["steps"], steps, strict=True):
        batches = [family.batch(2, [row]) if len(row) > 1 else family.batch(2) for row in documents]
        assert len(set(batches)) > 1
        by_hand = estimate(schedule, family, batches)
        assert (each["step_s"], each["bubble_ratio"]) == (by_hand.step_s, by_hand.timeline.bubble_ratio)
        assert each["peak_bytes"] == by_hand.peak_bytes
        work = [family.batch_s(batch) for batch in batches]
        assert each["imbalance"] == pytest.approx(max(work) / statistics.mean(work), rel=0.1)
    times = [each["step_s"] for each in found["data"]["steps"]]
    assert sorted(times)[1] == found["step_s"] == times[found["data"]["shown_step"] - 1]


def test_the_numbers_of_all_steps(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(
        capsys, f"simulate 1f1b {SIZES} --data {folders['tailed']} --packing documents --longest drop --seed 3"
    )
    data = found["data"]
    steps = data["steps"]
    assert [each["step"] for each in steps] == list(range(1, 21))
    assert (data["packing"], data["longest"], data["seed"]) == ("documents", "drop", 3)
    for name in ("step_s", "bubble_ratio"):
        values = [each[name] for each in steps]
        assert data[name]["mean"] == pytest.approx(statistics.mean(values))
        assert data[name]["p95"] == pytest.approx(float(np.percentile(values, 95)))
        assert data[name]["p95"] >= data[name]["mean"]
    assert data["tokens_per_s"]["mean"] == pytest.approx(4 * LENGTH / data["step_s"]["mean"])
    assert data["tokens_per_s"]["p95"] == pytest.approx(4 * LENGTH / data["step_s"]["p95"])
    assert data["peak_bytes"] == max(each["peak_bytes"] for each in steps)
    assert data["padding_share"] == pytest.approx(statistics.mean(each["padding_share"] for each in steps))
    assert data["imbalance"]["mean"] > 1
    other = asked(
        capsys, f"simulate 1f1b {SIZES} --data {folders['tailed']} --packing documents --longest drop --seed 4"
    )
    assert other["data"]["steps"] != steps


def test_balanced_is_no_slower_than_documents(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Over the steps among which rows are dealt, which have the same documents in both. Replicas wait for the dearest; of one alone
    micro-batches that differ are as good, since the cheap ones come first and last.
    """
    line = f"simulate 1f1b {SIZES} --dp 2 --steps 16 --data {folders['tailed']}"
    line = line.replace(f"--sequence-length {LENGTH}", f"--sequence-length {4 * LENGTH}")
    packed, balanced = (asked(capsys, f"{line} --packing {packing}")["data"] for packing in ("documents", "balanced"))
    assert balanced["step_s"]["mean"] <= packed["step_s"]["mean"]
    assert balanced["bubble_ratio"]["mean"] < packed["bubble_ratio"]["mean"]
    assert balanced["imbalance"]["mean"] < packed["imbalance"]["mean"]


def test_a_step_waits_for_its_slowest_replica(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, f"simulate 1f1b {SIZES} --dp 2 --data {folders['tailed']} --packing documents --steps 1")
    whole = setting(data_parallel=2)
    schedule = whole.build("1f1b", 2, 4)
    (documents,) = documents_of(folders["tailed"], 1, dp=2)
    replicas = [estimate(schedule, whole, [whole.batch(1, [row]) for row in documents[at : at + 4]]) for at in (0, 4)]
    times = [each.step_s for each in replicas]
    assert times[0] != times[1]
    assert found["step_s"] == max(times)
    assert found["data"]["shown_replica"] == times.index(max(times))
    busy = [each.timeline.busy_s for each in replicas]
    makespan_s = max(each.timeline.makespan_s for each in replicas)
    assert found["data"]["bubble_ratio"]["mean"] == pytest.approx(1 - sum(map(sum, busy)) / (4 * makespan_s))


def test_what_is_drawn_says_which_step_it_is(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tmp_path / "a.svg", tmp_path / "a.html"
    line = f"simulate 1f1b {SIZES} --dp 2 --data {folders['tailed']} --packing balanced --steps 3"
    assert main(f"{line} --svg {files[0]} --html {files[1]}".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"steps 1 to 3 of {folders['tailed']}: packing balanced, longest cut, seed 0"
    assert lines[1].split() == ["mean", "95th", "percentile"]
    assert [each.split()[0] for each in lines[2:6]] == ["step", "tokens/s", "bubble", "imbalance"]
    (told,) = [each.removesuffix(":") for each in lines if ", the nearest to the median" in each]
    assert told.endswith(", the slowest")
    for file in files:
        assert told in file.read_text()
    assert main(f"simulate 1f1b {SIZES} --data {folders['tailed']} --steps 2".split()) == 0
    assert "attention goes across documents: all steps cost the same; see --packing" in capsys.readouterr().out


def test_a_pair_of_megatron_s_is_read_as_well(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = np.full(40, LENGTH + 1)
    np.zeros(lengths.sum(), "<u2").tofile(tmp_path / "pair.bin")
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 40, 41)
    offsets = (np.cumsum(lengths) - lengths) * 2
    arrays = lengths.astype("<i4").tobytes() + offsets.astype("<i8").tobytes() + np.arange(41).astype("<i8").tobytes()
    (tmp_path / "pair.idx").write_bytes(head + arrays)
    line = f"simulate 1f1b {SIZES} --packing documents --data"
    pair, folder = (asked(capsys, f"{line} {path}") for path in (tmp_path / "pair", folders["whole"]))
    assert {**pair["data"], "path": ""} == {**folder["data"], "path": ""}


def test_measured_costs_price_documents(
    profile: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A step is cheaper than one of whole sequences by the pairs of tokens that are hidden: the profile's are linear in them."""
    whole, packed = (
        asked(capsys, f"simulate 1f1b {SIZES} --profile {profile} --data {folders[name]} --packing documents --steps 2")
        for name in ("whole", "tailed")
    )
    assert packed["hardware"] == "measured costs"
    assert packed["data"]["ideal_s"]["mean"] < whole["data"]["ideal_s"]["mean"]
    costs, attention = Profile.load(profile), SHAPES["tiny"].chain()[3]
    assert attention.about.attends
    rows = ((100, 60, 96),)
    apart = sum(costs.forward_s(attention, Batch(1, (length,)), 0) for length in rows[0])
    assert costs.forward_s(attention, Batch(1, (LENGTH,), rows), 0) == pytest.approx(apart)


def test_compare_predicts_the_step_that_was_measured(
    folders: dict[str, Path], profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every action of the third step took a time of its own, and messages none: a replay is that very step."""
    config = build_config({
        "data": {"path": str(folders["tailed"]), "packing": "documents"}, "train": {"sequence_length": LENGTH},
        "schedule": {"family": "seq1f1b", "segments": 2, "ranks": 2, "microbatches": 4}, "run": {"timeline_step": 3},
    })  # fmt: skip
    schedule, shape = config.build_schedule(), config.setting()
    *_, third = documents_of(folders["tailed"], 3)
    batches = [shape.batch(2, [row]) if len(row) > 1 else shape.batch(2) for row in third]
    program = lower(schedule, shape.shape, batches)
    took = {
        action: 1e-3 * (1 + number % 7) for number, action in enumerate(a for order in schedule.ranks for a in order)
    }
    measured = simulate_program(program, took.__getitem__, keeping=shape.keeping, share=shape.share)
    (tmp_path / "config.toml").write_text(write_toml(config))
    (tmp_path / "timeline.json").write_text(to_json(measured))
    rows = asked(capsys, f"compare {tmp_path}")["numbers"]
    assert [row["ratio"] for row in rows if row["name"] != "bubble_ratio"] == pytest.approx([1] * (len(rows) - 1))
    priced = asked(capsys, f"compare {tmp_path} --hardware laptop-core")["numbers"]
    by_hand = estimate(schedule, replace(shape, accelerator=named_accelerator("laptop-core")), batches).timeline
    assert [row["predicted"] for row in priced if row["name"] == "busy_s"] == pytest.approx(list(by_hand.busy_s))
    priced = asked(capsys, f"compare {tmp_path} --profile {profile}")["numbers"]
    by_hand = estimate(schedule, replace(shape, profile=Profile.load(profile)), batches).timeline
    assert [row["predicted"] for row in priced if row["name"] == "busy_s"] == pytest.approx(list(by_hand.busy_s))


def test_percentiles_lie_between_values() -> None:
    values = [3.0, 1.0, 2.0, 10.0]
    for share in (0.0, 0.5, 0.95, 1.0):
        assert percentile(values, share) == pytest.approx(float(np.percentile(values, 100 * share)))
    assert percentile([0.1] * 7, 0.95) == 0.1


def test_layers_that_are_not_told_where_documents_begin_are_refused() -> None:
    opaque = build_schedule("1f1b", ranks=2, layers=4, microbatches=2, opaque=True)
    with pytest.raises(ConfigError, match=r"opaque: block\.0 is one block, which is not told where documents begin"):
        price_step(opaque, setting(), ((100, 156), (LENGTH,)))
    assert price_step(opaque, setting(), ((LENGTH,), (LENGTH,)))
    with pytest.raises(ConfigError, match="documents: of 3 rows, and a step has 2"):
        step_batches(setting(), opaque, ((LENGTH,),) * 3)


@pytest.mark.parametrize("command", ["simulate 1f1b", "plan --families 1f1b --processes 1"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data {top}", "error: --data: '{top}' has no manifest.json; it is not what helixpipe prepare writes"),
        ("--data {top}/nowhere", "error: --data: '{top}/nowhere' has no .idx beside it; documents of a .bin are known by its index"),
        ("--data {whole} --packing document", "error: --packing: 'document' is not known; known: windows, documents, balanced"),
        ("--data {whole} --longest keep", "error: --longest: 'keep' is not known; known: cut, drop"),
        ("--data {whole} --steps 0", "error: --steps: 0; give at least 1"),
        ("--data {whole} --seed -1", "error: --seed: -1; give at least 0"),
        ("--packing balanced", "error: --packing: says how data is read; give --data FOLDER too"),
        ("--steps 3", "error: --steps: says how data is read; give --data FOLDER too"),
        ("--data {whole} --packing documents --sequence-length 1",
         "error: --sequence-length: 1, and --packing documents needs at least 2; raise it"),
        ("--data {few} --packing documents",
         "error: --data: '{few}' makes 4 sequences to train on, fewer than the 8 of a step; give more data, or fewer or shorter"),
        ("--data {long} --packing documents --longest drop",
         "error: --data: '{long}' has no document to train on: 9 of 9 are longer than a sequence of 256 and dropped; set --longest to cut"),
        ("--data {few} --sequence-length 8192", "fewer than a sequence and its next token (8193); shorten --sequence-length"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    command: str, flags: str, message: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    names = folders | {"top": folders["whole"].parent}
    assert main([*command.split(), *SIZES.split(), "--dp", "2", *flags.format(**names).split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert message.format(**names) in shown.err


def test_opaque_layers_are_refused_by_the_flag(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    line = f"simulate 1f1b {SIZES} --opaque 0,1 --data {folders['tailed']} --packing documents"
    assert main(line.split()) == 2
    assert "error: --opaque: block.0 is one block, which is not told where documents begin; " in capsys.readouterr().err


def test_tokens_beyond_the_model_s_vocabulary_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)} | {"<|end|>": 300}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    lines = write_lines(tmp_path / "a.jsonl", [{"text": "w299 " * LENGTH}] * 8)
    prepare(tmp_path / "large", write_tokenizer(tmp_path / "tokenizer", words), lines)
    capsys.readouterr()
    assert main(f"simulate 1f1b {SIZES} --data {tmp_path / 'large'} --packing documents".split()) == 0
    assert capsys.readouterr().err == (
        f"--data: '{tmp_path / 'large'}' has token 300, beyond the model's vocabulary of 256: lengths are priced as they are, "
        "and training would refuse it\n"
    )


def test_the_guide_s_example_is_what_the_commands_say(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs/guide/data.md").read_text(encoding="utf-8")
    section = page.split("## What it will take\n")[1].split("\n## ")[0]
    simulating, planning = re.findall(r"(?m)^    helixpipe (.*) \\\n +(.*)$", section)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # no line is wrapped
    (tmp_path / "FOLDER").symlink_to(folders["page"])
    capsys.readouterr()
    assert main(" ".join(simulating).split()) == 0
    shown = re.search(r"(?ms)^    (steps 1 to .*?)^    \.\.\.$", section)
    assert shown is not None
    assert capsys.readouterr().out.startswith(re.sub(r"(?m)^    ", "", shown[1]))
    assert main([*" ".join(planning).split(), "--processes", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "FOLDER: packing balanced, longest cut, seed 0"
    assert lines[3].startswith("step and bubble are means of steps 1 to 4, bytes the most of them")
    assert read_toml("best.toml")["data"]["packing"] == "balanced"


def test_data_needs_no_torch(folders: dict[str, Path]) -> None:
    line = f"simulate 1f1b {SIZES} --data {folders['whole']} --packing balanced --steps 2"
    assert "torch" not in imported_by(f"from helixpipe.cli import main; assert main({line.split()!r}) == 0")
