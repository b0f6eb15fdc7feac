"""Where no machine is named, the commands say that seconds mean nothing by themselves, and what to name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_compare_command import run as run  # a fixture

from helixpipe.cli import main
from helixpipe.commands.setting import duration

NOTE = "hardware ideal is no machine: only ratios of predicted times mean anything; name --hardware or --profile for seconds"
SMALL = "--ranks 2 --microbatches 4 --model tiny --sequence-length 1024"
ASKED = {
    "simulate": f"simulate 1f1b {SMALL}",
    "rehearse": f"rehearse 1f1b {SMALL} --seconds 0.2",
    "plan": f"plan {SMALL} --families 1f1b --processes 1",
}
# the line before it has seconds, or says what they are of
FOLLOWS = {"simulate": "step ", "rehearse": "a step of ", "plan": "", "compare": ""}


def told(capsys: pytest.CaptureFixture[str], line: str) -> list[str]:
    capsys.readouterr()
    assert main(line.split()) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out.splitlines()


def told_as_json(capsys: pytest.CaptureFixture[str], line: str) -> list[dict[str, Any]]:
    (only,) = told(capsys, f"{line} --json")
    found = json.loads(only)
    return found if isinstance(found, list) else [found]


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """What its first call gave, for every call."""
    found: list[Any] = []

    def call(*arguments: Any, **more: Any) -> Any:
        if not found:
            found.append(function(*arguments, **more))
        return found[0]

    return call


@pytest.mark.parametrize("command", [*ASKED, "compare"])
def test_no_machine_has_only_ratios(
    command: str, run: Path, profile: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no line is wrapped
    if command == "rehearse":  # what is said of a machine needs no processes of its own each time
        from helixpipe.runtime import emulated

        monkeypatch.setattr(emulated, "rehearse", once(emulated.rehearse))
    line = ASKED.get(command, f"compare {run}")
    nothing_named = [line, f"{line} --hardware ideal"] if command in ASKED else [f"{line} --hardware ideal"]
    for each in nothing_named:
        lines = told(capsys, each)
        assert lines.count(NOTE) == 1
        assert lines[lines.index(NOTE) - 1].startswith(FOLLOWS[command])
        assert lines.index(NOTE) < 3
        assert all(found["only_ratios"] is True for found in told_as_json(capsys, each))
    named = [f"{line} --hardware h100", f"{line} --profile {profile}"] + ([line] if command == "compare" else [])
    for each in named:
        assert not any("ratios" in word for word in told(capsys, each))
        assert all(found["only_ratios"] is False for found in told_as_json(capsys, each))


def test_the_page_says_so_too(tmp_path: Path) -> None:
    for hardware, expected in (("ideal", True), ("h100", False)):
        page = tmp_path / f"{hardware}.html"
        assert main(f"{ASKED['simulate']} --hardware {hardware} --html {page}".split()) == 0
        assert ("ideal: only ratios mean anything" in page.read_text()) is expected


def test_long_times_are_read_as_numbers() -> None:
    times = {50442.3: "50,442 s", 9999.4: "9999 s", 9999.5: "10,000 s", 54.471: "54.47 s", 0.0012: "1.2 ms", 0.0: "0 s"}
    assert {each: duration(each) for each in times} == times
