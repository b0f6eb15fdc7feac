"""`helixpipe plan --accelerators`: what it prints, the config that trains, and what starts it."""

from __future__ import annotations

import json
import re
import tomllib
from functools import partial
from pathlib import Path

import pytest

from helixpipe.cli import main
from helixpipe.commands import plan_accelerators
from helixpipe.commands.planned import launch_line, slurm_script
from helixpipe.flags import amount, corpus

ROOT = Path(__file__).parents[2]
TINY = "--model tiny --sequence-length 1k --accelerators 4 --batch 8 --families 1f1b,seq1f1b --processes 1"
H100 = f"{TINY} --hardware h100"
ONE = "--ranks 1 --cp 1 --tp 1 --microbatch-size 1 --families 1f1b"


def told(capsys: pytest.CaptureFixture[str], line: str) -> list[str]:
    capsys.readouterr()
    assert main(["plan", *line.split()]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out.splitlines()


def test_what_was_let_go_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_accelerators, "search", partial(plan_accelerators.search, patience=1))
    text = " ".join(" ".join(told(capsys, f"{H100} --top 3")).split())
    found = re.search(r"of named families no other is faster by more than (\d+)%", text)
    assert found is not None
    assert 1 <= int(found[1]) <= 50


def test_the_answer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = told(capsys, f"{H100} --top 3 --tokens 1B")
    assert max(map(len, lines)) <= 80
    assert lines[0] == "tiny, 853k parameters; a step of 8 sequences of 1,024 tokens, 8,192 in all"
    assert lines[1] == "4 x h100, 68.5 GiB each; nvlink among 4 of a node"
    assert lines[2].startswith("attention: FlashAttention 2 0.34 of the peak forward and 0.33 backward")
    assert [line[:3] for line in lines if re.match(r" +\d+ ", line)] == ["  1", "  2", "  3"]
    text = " ".join(" ".join(lines).split())
    assert re.search(r"\d+ layouts; \d+ schedules simulated in \d+ s, of named families no other is faster", text)
    assert "1,000,000,000 tokens: 122,071 steps, " in text
    assert " accelerator-hours " in text
    assert re.search(r"the fullest accelerator.*: weights .*, gradients .*, optimizer .*, kept .*, workspace ", text)
    assert "why not faster: " in text
    assert "not of helixpipe train: fsdp, weights sharded over all: " in text
    monkeypatch.setenv("COLUMNS", "160")
    assert len(told(capsys, f"{H100} --top 3 --tokens 1B")) < len(lines)


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = told(capsys, f"{H100} --tp 2 --json")
    found = json.loads(line)
    assert {row["mesh"]["tp"] for row in found["rows"]} == {2}
    times = [row["step_s"] for row in found["rows"]]
    assert times == sorted(times)
    for row in found["rows"]:
        assert row["mesh"]["pp"] * row["mesh"]["dp"] * row["mesh"]["cp"] * 2 == 4
        assert (row["family"] is None) == (row["mesh"]["pp"] == 1)
        assert row["microbatches"] * row["microbatch_size"] * row["mesh"]["dp"] == 8
    seconds = found["best"]["seconds"]
    assert sum(seconds.values()) == pytest.approx(times[0])
    assert 0 < found["best"]["model_flops_utilisation"] < 1
    assert found["attention"]["kernel"] == "FlashAttention 2"
    assert found["only_ratios"] is False


def test_no_machine_has_only_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys, f"{TINY} {ONE}")
    assert any(line.startswith("hardware ideal is no machine: only ratios") for line in lines)
    assert not any(line.startswith("attention: ") for line in lines)


def test_a_row_is_what_simulate_says_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = told(capsys, f"{H100} --ranks 2 --cp 2 --context-method ulysses --per-node 2 --microbatch-size 1 --json")
    row = json.loads(line)["rows"][0]
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in row["options"].items())
    again = (
        f"simulate {row['family']} --ranks 2 --microbatches {row['microbatches']} --model tiny --sequence-length 1k "
        f"--hardware h100 --cp 2 --context-method ulysses --per-node 2 --optimizer {row['optimizer']} {options} "
        f"--recompute {row['recompute']} --mlp-chunk {row['chunk']} --head-chunk {row['chunk']} "
        f"--evenness {row['evenness']} --json"
    )
    assert main(again.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step_s"] == row["step_s"]
    assert max(rank["peak_bytes"] for rank in found["ranks"]) == row["peak_bytes"]


def test_the_config_trains_once_it_is_told_what_no_plan_knows(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = (
        "--model tiny --layers 3 --sequence-length 256 --accelerators 2 --batch-tokens 2k --hardware laptop-core "
        "--processes 1 --cp 2 --microbatch-size 1 --families 1f1b --config best.toml --slurm best.sbatch"
    )
    lines = told(capfd, asked)
    assert lines[-2:] == [
        "set in best.toml what run.asks names, then start it on every node with",
        "    sbatch best.sbatch",
    ]
    table = tomllib.loads(Path("best.toml").read_text())
    assert table["run"]["asks"] == ["data.path", "train.steps", "train.learning_rate"]
    assert table["model"] == {"name": "tiny", "layers": 3}
    assert "learning_rate" not in table["train"]
    assert "steps" not in table["train"]
    assert table["mesh"]["cp"] == 2
    assert main(["train", "best.toml", "--train.steps", "2"]) == 2
    assert capfd.readouterr().err == (
        "helixpipe: error: data.path, train.learning_rate: left open by the config; give them, such as --data.path VALUE\n"
    )
    Path("text.txt").write_text("what a plan does not know " * 500)
    flags = "--data.path text.txt --train.steps 2 --train.learning_rate 1e-3 --train.evaluate_every 0 --data.held_out 0"
    assert main(["train", "best.toml", *flags.split(), "--run.timeline_step", "0"]) == 0
    assert "trained to step 2" in capfd.readouterr().out


def test_a_bidirectional_model_is_asked_for_its_objective(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "a.toml"
    lines = told(capsys, f"{TINY} --causal false --config {config}")
    assert "segments" not in " ".join(lines)
    assert "train.objective" in tomllib.loads(config.read_text())["run"]["asks"]


def test_what_starts_it() -> None:
    assert launch_line("a.toml", 8, 8) == "torchrun --standalone --nproc-per-node 8 -m helixpipe train a.toml --resume"
    assert launch_line("a.toml", 64, 8) == (
        "torchrun --nnodes 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --nproc-per-node 8 -m helixpipe train a.toml --resume"
    )
    example = (ROOT / "examples/slurm/train.sbatch").read_text()
    written = slurm_script("examples/slurm/train.sbatch", "examples/cluster.toml", 64, 8)
    assert written == example.replace("--job-name=helixpipe", "--job-name=cluster")


def test_numbers_as_people_write_them(capsys: pytest.CaptureFixture[str]) -> None:
    plain = told(capsys, f"{TINY.replace('1k', '1024')} {ONE}")
    assert told(capsys, f"{TINY} {ONE}")[0] == plain[0]
    tokens = TINY.replace("--batch 8", "--batch-tokens 8k")
    assert told(capsys, f"{tokens} {ONE}")[0] == plain[0]
    assert plain[0].endswith("a step of 8 sequences of 1,024 tokens, 8,192 in all")
    assert amount("4M") == 4 * 2**20  # lengths and batches are powers of two, a corpus is counted in tens
    assert (corpus("500M"), corpus("1.5k"), corpus("100B")) == (500_000_000, 1500, 100_000_000_000)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model tiny --sequence-length 1k", "missing: --ranks, --microbatches; or give --accelerators N and --batch"),
        ("--model tiny --sequence-length 1k --ranks 2 --microbatches 2 --batch 4", "--batch: --microbatches says it here; give --accelerators with it"),
        (f"{TINY} --microbatches 4", "--microbatches: they follow from --batch and the mesh; leave it out"),
        (f"{TINY} --batch-tokens 8k", "--batch, --batch-tokens: both are given; give one of them"),
        (TINY.replace("--batch 8", ""), "--batch, --batch-tokens: how much is a step; give one of them"),
        (TINY.replace("--batch 8", "--batch-tokens 100"), "--batch-tokens: 100 tokens are less than half a sequence; give at least one sequence"),
        (TINY.replace("--batch 8", "--batch many"), "--batch: 'many' is not a whole number, such as 4096, 128k, 4M or 100B"),
        (TINY.replace("1k", "2B"), "--sequence-length: '2B' is not below a billion"),
        (f"{TINY} --slurm a", "--slurm: the script starts a config; give --config FILE too"),
        (f"{TINY} --top 0", "--top: 0; give at least 1"),
        (f"{TINY} --per-node 3", "--accelerators: 4 do not fill nodes of 3; give a multiple, or another --per-node"),
        (f"{TINY} --per-node 0", "--per-node: 0; give at least 1"),
        (TINY.replace("--accelerators 4", "--accelerators 0"), "--accelerators: 0; give at least 1"),
        (f"{TINY} --tp 0", "--tp: 0; give at least 1"),
        (f"{TINY} --tp 3", "--accelerators: no layout of 4 can be: tp 3 does not divide them"),
        (f"{TINY} --context-method rings", "--context-method: 'rings' is not known; known: ring, ulysses"),
        (f"{TINY} --memory 0.001", "--memory: no plan fits 1.0 MiB; the nearest is "),
        (f"{TINY} --memory 0", "--memory: 0 GiB; give more than 0"),
        (f"{TINY} --memory nan", "--memory: 'nan' is not a number"),
        (f"{TINY} --ranks -2", "--ranks: -2; give at least 1"),
        (f"{TINY} --ranks 1.5", "--ranks: '1.5' is not a whole number below a billion"),
        (f"{TINY} --ranks 2 --dp 2 --cp 2 --tp 2", "--accelerators: no layout of 4 can be: pp 2 x dp 2 x cp 2 x tp 2 does not divide them"),
        (f"{TINY} --ranks 2 --dp 1 --cp 1 --tp 1", "--accelerators: no layout of 4 can be: pp 2 x dp 1 x cp 1 x tp 1 are 2"),
        (f"{TINY} --microbatch-size 3", "--accelerators: no layout of 4 can be: batch: 8 sequences do not divide over dp "),
        (f"{TINY} --microbatch-size 0", "--microbatch-size: 0; give at least 1"),
        (TINY.replace("--batch 8", "--batch 0"), "--batch: 0; give at least one sequence"),
        (TINY.replace("--batch 8", "--batch 2.5"), "--batch: '2.5' is not a whole number, such as 4096, 128k, 4M or 100B"),
        (TINY.replace("--batch 8", "--batch -1"), "--batch: '-1' is not a whole number"),
        (TINY.replace("--accelerators 4", "--accelerators 1000003 --per-node 1"), "--accelerators: no layout of 1000003 can be: mesh.tp: 1000003 ranks do not divide model.heads 4"),
        (TINY.replace("--accelerators 4", "--accelerators 1000000000000"), "--accelerators: '1000000000000' is not a whole number below a billion"),
        (TINY.replace("1k", "0"), "--sequence-length: 0; give at least 1"),
        (f"{TINY} --optimizer divided", "--optimizer: 'divided' is not known; known: replicated, sharded"),
        (f"{TINY} --profile a", "--profile: it is of one tp and cp; leave it out, or --accelerators"),
        (f"{TINY} --heads 3", "--heads: 3 heads do not divide hidden size 128"),
        (TINY.replace("1f1b,seq1f1b", "1f2b"), "--families: '1f2b' is not known; did you mean '1f1b'?"),
        (TINY.replace("tiny", "llama3-70b"), "--model: 'llama3-70b' is not known; did you mean 'llama3.1-70b'?"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *line.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert message in shown.err
