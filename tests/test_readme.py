"""The README as a new user reads it: what it prints runs as it stands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helixpipe.cli import main
from helixpipe.train.job import prepare

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every `helixpipe ...` of an indented block, without what is said beside it."""
    joined = re.sub(r" \\\n +", " ", README)
    lines = re.findall(r"^    (?:helixpipe|torchrun .* -m helixpipe) (.*)$", joined, re.MULTILINE)
    return [shlex.split(re.split(r" {3,}", line)[0]) for line in lines]


def asked(command: str) -> list[list[str]]:
    found = [arguments for arguments in commands() if arguments[0] == command]
    assert found, f"no helixpipe {command} in the README"
    return found


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files may be written; what the README names of the checkout is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.splitlines()[0])
def test_python_runs_as_it_stands(block: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    predicted, measured = done.stdout.splitlines()
    seconds, bubble, peak_bytes = re.fullmatch(r"(\S+) (\S+) \((.*)\)", predicted).groups()
    assert float(seconds) > 100
    assert 0 < float(bubble) < 0.2
    assert len(peak_bytes.split(",")) == 8
    assert float(measured.split()[0]) == pytest.approx(
        5.6, abs=0.1
    )  # of 256 tokens, nothing is known: log 256 and a bit


def test_there_is_python_to_run() -> None:
    assert len(PYTHON) == README.count("```python") >= 1
    assert "\n    import " not in README


def test_commands_that_need_no_run_run(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in [*asked("show"), *asked("check"), *asked("simulate")]:
        assert main(arguments) == 0, arguments
    assert (elsewhere / "step.html").exists()
    capsys.readouterr()


def test_the_picture_at_the_top_is_what_its_command_draws(elsewhere: Path) -> None:
    (line,) = re.findall(r"`helixpipe (show [^`]*)`", " ".join(README.split()))
    assert main([*line.split(), "--json"]) == 0
    (shown,) = re.findall(r"!\[[^]]*\]\(([^)]*)\)", README)
    assert (elsewhere / "helix.svg").read_text() == (ROOT / shown).read_text()


def test_the_plan_s_first_row_is_what_simulate_says_of_it(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (arguments,) = asked("simulate")
    assert main(arguments) == 0
    head, step, *rows = capsys.readouterr().out.splitlines()
    row = re.search(r"1\* +(\S+ s) +(\S+) +(\S+%) +(\S+ GiB)  (.*)", README)
    assert row is not None
    told = re.match(r"step (\S+ s), (\S+) of ideal .* bubble (\S+%)", step)
    assert told is not None
    assert (row[1], row[3]) == (told[1], told[3])
    assert float(row[2]) == pytest.approx(float(told[2]), abs=6e-4)
    full = max(float(r.split()[-2]) for r in rows if r.endswith("GiB"))
    assert row[4] == f"{full} GiB"
    assert row[5] == f"{head.split(':')[0]}, recompute none"


def test_plan_and_rehearse_run(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan of one family, and a rehearsal of a second."""
    (plan,), (rehearse,) = asked("plan"), asked("rehearse")
    assert main([*plan, "--families", "1f1b", "--processes", "1"]) == 0
    told = ["--data.path", "text.txt", "--data.held_out", "0", "--train.steps", "10", "--train.learning_rate", "1e-3"]
    (elsewhere / "text.txt").write_text("what a plan does not know " * 20000)
    assert prepare(["best.toml", *told], lambda line: None).config.schedule.family == "1f1b"
    assert main([*rehearse, "--seconds", "1"]) == 0
    capsys.readouterr()


def test_preparing_runs(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a tokenizer of single letters."""
    import tokenizers

    (elsewhere / "texts").mkdir()
    (elsewhere / "texts/a.txt").write_text("abba")
    (elsewhere / "models/mine").mkdir(parents=True)
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
    library.save(str(elsewhere / "models/mine/tokenizer.json"))
    (elsewhere / "models/mine/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    ((_, *arguments),) = asked("prepare")
    assert main(["prepare", *arguments]) == 0
    assert capsys.readouterr().out == "tokens: 1 documents, 5 tokens, of which 5 count; vocabulary 3\n"


def test_where_seconds_are_promised_a_machine_is_named() -> None:
    for command in ("plan", "simulate", "rehearse"):
        for arguments in asked(command):
            assert {"--hardware", "--profile"} & set(arguments), arguments


def test_training_commands_are_understood(elsewhere: Path) -> None:
    """Those that continue a run need one: `tests/end_to_end` has it."""
    lines = [arguments for _, *arguments in asked("train") if not {"--resume", "--help"} & set(arguments)]
    assert len(lines) >= 3
    for arguments in lines:
        given = [word.replace("/shared/", f"{elsewhere}/") for word in arguments]
        assert prepare(given, lambda line: None).step == 0
