"""The commands as a user runs them: what they print, where, and how they refuse."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import helixpipe
from helixpipe.cli import main
from helixpipe.flags import OPTIONS
from helixpipe.schedule.families import FAMILIES, build_schedule, options
from helixpipe.schedule.text import from_json, load, save

SHOW = "; write helixpipe show FAMILY --ranks P --layers L --microbatches M [options], or see --help"
SIZES = ["--ranks", "2", "--layers", "2", "--microbatches", "4"]


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on standard error of a command that must fail with 2 and print nothing else."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("helixpipe: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err.removeprefix("helixpipe: error: ").strip()


def helixpipe_process(*arguments: str, **given: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "helixpipe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **given)


# show


def test_show_draws_the_staircase(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "1f1b", *SIZES]) == 0
    assert capsys.readouterr().out == (
        "1f1b: ranks 2, layers 2, microbatches 4\n"
        "stage 0: embed norm.0 qkv.0 attn.0 proj.0 mlp.0; stage 1: norm.1 qkv.1 attn.1 proj.1 mlp.1 head.2\n"
        "\n"
        "rank 0   F0 F1 .. B0 F2 B1 F3 B2 .. B3\n"
        "rank 1   .. F0 B0 F1 B1 F2 B2 F3 B3\n"
        "\n"
        "in units (see --help): makespan 90, bubble 20.0%\n"
        "forwards kept at once, at most: 1 to 2 by rank\n"
    )


def test_show_passes_the_options_on(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"folds": 1, "travel": "qkv", "groups": "forward_first"}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main(["show", "helix", *SIZES, *flags, "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert out.count("\n") == 1
    assert err == ""
    schedule = build_schedule("helix", ranks=2, layers=2, microbatches=4, **options)
    assert from_json(json.dumps(told.pop("schedule"))) == schedule
    assert told == {
        "family": "helix",
        "options": options,
        "ranks": 2,
        "stages": 5,
        "layers": 2,
        "microbatches": 4,
        "actions": 40,
        "makespan_units": told["makespan_units"],
        "bubble_ratio": told["bubble_ratio"],
        "peak_forwards": [12, 8],
    }
    assert told["bubble_ratio"] == pytest.approx(1 - (1 + 4 + 2 + 4 + 2) * 3 * 4 / (2 * told["makespan_units"]))


OF_ITS_OWN = {
    "segments": 3, "stages_per_rank": 3, "group": 6, "folds": 3, "travel": "qkv", "groups": "forward_first",
    "costs": (1.0, 2.0, 0.5), "opaque": (1,), "ends": (0.5, 1.5),
    "balance": "work", "work": (1.0, 3.0, 2.0, 9.0, 2.5, 4.0),
    "placement": "v", "memory": "1.5", "tries": 3, "delay": 0.25,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_own_options_as_flags(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in options(family):
        value = OF_ITS_OWN[name]
        own = {name: value} | ({"segments": 1} if name == "opaque" and "segments" in options(family) else {})
        own |= {"balance": "work"} if name == "work" else {}
        text = {key: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for key, v in own.items()}
        flags = [f"--{key.replace('_', '-')}={v}" for key, v in text.items()]
        sizes = {"ranks": 2, "layers": 12, "microbatches": 6}
        assert main(["show", family, *(f"--{key}={number}" for key, number in sizes.items()), *flags, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert from_json(json.dumps(told["schedule"])) == build_schedule(family, **sizes, **own)


def test_help_tells_who_has_an_option_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["show", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--folds N a group is N x P micro-batches: 1 is the naive order, 2 the two-fold [helix: default 2]" in told
    assert "--ends E,H how many layers' work embed and head are [all but helix; default 0,0]" in told
    for family in FAMILIES:
        for option in options(family):
            assert f" --{option.replace('_', '-')} " in told
            assert OPTIONS[option][1] in told


def test_show_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svg, csv = tmp_path / "a.svg", tmp_path / "a.csv"
    assert main(["show", "helix", *SIZES, "--svg", str(svg), "--csv", str(csv), "--json"]) == 0
    assert ElementTree.parse(svg).getroot().find("{http://www.w3.org/2000/svg}title").text == (
        "helix: ranks 2, layers 2, microbatches 4"
    )
    assert load(csv) == build_schedule("helix", ranks=2, layers=2, microbatches=4)
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "a.svg"]


def test_show_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for columns in (80, 120, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(["show", "helix", "--ranks", "4", "--layers", "8", "--microbatches", "8"]) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= columns
        assert "8F0" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("shwo", "'shwo' is not a command; did you mean 'show'?"),
        (
            "xyzzy",
            "'xyzzy' is not a command; known: prepare, train, evaluate, plan, simulate, rehearse, export, show, check, profile, compare",
        ),
        ("show", "missing: FAMILY, --ranks, --layers, --microbatches" + SHOW),
        ("show helix --ranks 2", "missing: --layers, --microbatches" + SHOW),
        ("show helix --rank 2", "'--rank' is not an option of helixpipe show; did you mean '--ranks'?"),
        (
            "show helix --microbatch=2",
            "'--microbatch' is not an option of helixpipe show; did you mean '--microbatches'?",
        ),
        ("show helix --ranks two", "--ranks: 'two' is not a whole number below a billion"),
        ("show helix --ranks 2.0", "--ranks: '2.0' is not a whole number below a billion"),
        ("show helix --ranks 99999999999", "--ranks: '99999999999' is not a whole number below a billion"),
        ("show helix --ranks", "--ranks: no value follows; write --ranks=VALUE if it starts with a dash"),
        ("show helix --ends -1,2", "--ends: no value follows; write --ends=VALUE if it starts with a dash"),
        ("show helix -r 2", None),
        ("check -j a.csv", "'-j' is not an option of helixpipe check; did you mean '--json'?"),
        ("show helix 1f1b --ranks 2 --layers 2 --microbatches 2", "not understood: 1f1b" + SHOW),
        (
            "show helx --ranks 2 --layers 2 --microbatches 2",
            "FAMILY: 'helx' is not known; did you mean 'helix'?",
        ),
        ("show helix --ranks 0 --layers 2 --microbatches 2", "--ranks: 0; give at least 1"),
        ("show helix --ranks 2 --layers -2 --microbatches 2", "--layers: -2; give at least 1"),
        (
            "show 1f1b --ranks 4 --layers 3 --microbatches 2",
            "--ranks: 3 layers cannot fill 4 stages; use at most 3 ranks",
        ),
        (
            "show 1f1b --ranks 2 --layers 2 --microbatches 2 --folds 2",
            "--folds: not an option of 1f1b, which has --opaque, --ends, but of helix",
        ),
        (
            "show helix --ranks 2 --layers 2 --microbatches 2 --group 2",
            "--group: not an option of helix; did you mean '--groups'?",
        ),
        (
            "show zb_v --ranks 2 --layers 4 --microbatches 2 --costs 1,x,1",
            "--costs: '1,x,1' is not numbers with commas between them",
        ),
        (
            "show 1f1b --ranks 2 --layers 4 --microbatches 2 --opaque 0.5",
            "--opaque: '0.5' is not whole numbers with commas between them",
        ),
        (
            "show interleaved --ranks 2 --layers 4 --microbatches 2 --stages_per_rank 2",
            "'--stages_per_rank' is not an option of helixpipe show; did you mean '--stages-per-rank'?",
        ),
        (
            "show seq1f1b --ranks 2 --layers 4 --microbatches 2 --segments 0",
            "--segments: 0; give at least 1 (1 keeps the sequence whole)",
        ),
        (
            "show helix --ranks 2 --layers 2 --microbatches 2 --travel all",
            "--travel: 'all' is not known; known: none, qkv, attention",
        ),
        (
            "show helix --ranks 2 --layers 200000 --microbatches 2",
            "up to 2,400,006 actions are more than show draws (500,000); ask for fewer micro-batches, layers or ranks",
        ),
        ("show helix --ranks 999999999 --layers 1 --microbatches 1", None),
        ("check", "missing: FILE; write helixpipe check FILE [options], or see --help"),
        ("check a.csv b.csv", "not understood: b.csv; write helixpipe check FILE [options], or see --help"),
        ("check --jsn a.csv", "'--jsn' is not an option of helixpipe check; did you mean '--json'?"),
        ("check no.csv", "no.csv: cannot be read: no such file or directory"),
        ("check setup.py", "setup.py: a schedule file ends in .json or .csv"),
    ],
)
def test_bad_input_is_one_line(arguments: str, message: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    told = fails(capsys, *arguments.split())
    assert message is None or told == message


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, reason in {
        tmp_path / "no" / "a.svg": "no such file or directory",
        tmp_path: "is a directory",
        tmp_path / ("x" * 300): "file name too long",
    }.items():
        assert fails(capsys, "show", "gpipe", *SIZES, "--svg", str(path)) == f"{path}: cannot be written: {reason}"
    assert fails(capsys, "show", "gpipe", *SIZES, "--svg", "a\0b").startswith("'a\\x00b': a null byte")
    assert os.listdir(tmp_path) == []


# check


def test_check_tells_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "a.json", build_schedule("helix", ranks=3, layers=4, microbatches=6))
    assert main(["check", str(tmp_path / "a.json")]) == 0
    assert capsys.readouterr().out == "ok: ranks 3, stages 9, layers 4, microbatches 6, actions 108\n"
    assert main(["check", str(tmp_path / "a.json"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"ok": True, "ranks": 3, "stages": 9, "layers": 4, "microbatches": 6, "actions": 108}
    assert err == ""


def test_check_reads_torchs_files_when_told_the_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "torch.csv"
    assert main(["show", "1f1b", *SIZES, "--torch-csv", str(path), "--json"]) == 0
    capsys.readouterr()
    assert path.read_text() == "0F0,0F1,0B0,0F2,0B1,0F3,0B2,0B3\n1F0,1B0,1F1,1B1,1F2,1B2,1F3,1B3\n"
    assert main(["check", str(path), "--layers", "6"]) == 0
    assert capsys.readouterr().out == "ok: ranks 2, stages 2, layers 6, microbatches 4, actions 16\n"
    assert "line 1: a row of actions before any stage" in fails(capsys, "check", str(path))
    assert fails(capsys, "check", str(path), "--layers", "1") == (
        f"{path}: layers: 1, and the rows name 2 stages; give at least 2"
    )
    assert fails(capsys, "check", str(path), "--layers", "0") == "--layers: 0; give 1 to 100,000"
    path.write_text("0F0,0SEND_F0\n")
    assert "'0SEND_F0' moves data" in fails(capsys, "check", str(path), "--layers", "2")


def test_what_torch_cannot_say_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--svg", str(tmp_path / "a.svg"), "--torch-csv", str(tmp_path / "a.csv")]
    told = fails(capsys, "show", "helix", *SIZES, *files)
    assert told.startswith("stage 1 (attn.0) runs on ranks 0, 1, and a stage of torch's on one; use a family")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("0F1,", "", "rank 0, action 0F1: missing: every stage needs a forward for every segment of every micro-batch"),
        (
            "0F1,",
            "0F1,0F1,",
            "rank 0, position 2, action 0F1: duplicated: it is also on rank 0 at position 1; remove one",
        ),
        (
            "0B1\n1F0,1B0,1F1,1B1",
            "0B1,1F1,1B1\n1F0,1B0",
            "rank 1, position 0, action 1F0: stage 1 (norm.1 qkv.1 attn.1 proj.1 mlp.1 head.2) has parameters and runs on "
            "ranks 0, 1; keep it on one, or give it a home from which its weights travel",
        ),
        (
            "1F0,1B0",
            "1B0,1F0",
            "rank 1, position 0, action 1B0: needs 1F0, which comes later on the same rank, at position 1",
        ),
    ],
)
def test_check_tells_what_is_wrong(
    old: str, new: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.csv"
    save(path, build_schedule("1f1b", ranks=2, layers=2, microbatches=2))
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert fails(capsys, "check", str(path)) == reason
    assert main(["check", str(path), "--json"]) == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["ok"] is False
    place = [f"{name} {found[name]}" for name in ("rank", "position", "action") if found[name] is not None]
    assert f"{', '.join(place)}: {found['reason']}" == reason
    assert err == f"helixpipe: error: {reason}\n"


def test_a_cycle_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    save(path, build_schedule("gpipe", ranks=2, layers=2, microbatches=2))
    path.write_text(path.read_text().replace("0F0,0F1,0B0", "0F0,0B0,0F1"))
    assert fails(capsys, "check", str(path)) == (
        "rank 0, position 1, action 0B0: deadlock: rank 0 waits at 0B0 for 1B0, on rank 1 behind 1F1; "
        "rank 1 waits at 1F1 for 0F1, on rank 0 behind 0B0"
    )


def test_what_a_file_holds_cannot_break_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"stages": [{"parts": "embed", "home": null}], "ranks": [["0F\\n\\u001b[31m"]]}')
    assert "ranks[0][0]: '0F\\n\\x1b[31m' is not an action" in fails(capsys, "check", str(path))


# the rest


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"helixpipe {helixpipe.__version__}\n"
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: helixpipe COMMAND")
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: helixpipe COMMAND")
    for command in ("show", "check"):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: helixpipe {command}")


def test_help_tells_the_units(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["show", "--help"])
    assert re.search(r"qkv\s+1,\s+attention\s+3,\s+mlp\s+2", capsys.readouterr().out)


def test_a_run_whose_name_no_file_system_has_is_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    name = "x" * 300
    assert fails(capsys, "compare", name) == (
        f"{name}: no config.toml there; name a run folder, such as runs/default-1"
    )


def test_train_is_handed_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("helixpipe.train.main", lambda arguments: seen.append(arguments) or 0)
    assert main(["train", "config.toml", "--model.layers", "3"]) == 0
    assert seen == [["config.toml", "--model.layers", "3"]]


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m helixpipe show helix --ranks 8 --layers 64 --microbatches 64 --json"
    done = subprocess.run(
        ["sh", "-c", f"{command} | head -c 10"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == '{"family":'
    assert done.stderr == ""


def test_the_module_runs_too_and_ascii_terminals_are_enough() -> None:
    done = helixpipe_process("show", "helix", *SIZES, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert helixpipe_process("chekc").stderr == "helixpipe: error: 'chekc' is not a command; did you mean 'check'?\n"


def test_a_picture_can_go_down_a_pipe() -> None:
    done = helixpipe_process("show", "gpipe", *SIZES, "--csv", "/dev/stderr", "--json")
    assert done.stderr.startswith("# stage 0: ")
    assert json.loads(done.stdout)["family"] == "gpipe"
