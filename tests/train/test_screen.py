"""The screen: a line that is renewed never wraps, and shows what matters most."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from helixpipe.train import screen
from helixpipe.train.screen import Fields, Screen

FIELDS = ("loss 2.1992", "grad norm 0.460", "7,483 tokens/s", "MFU 41.2%", "bubble 14.9%", "peak activations 29.6 MiB")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(width: int, monkeypatch: pytest.MonkeyPatch, steps: int = 120, done: int = 7) -> list[str]:
    """The lines of a terminal of this width after a step."""
    terminal = Terminal()
    monkeypatch.setattr(screen.sys, "stderr", terminal)
    monkeypatch.setattr(
        screen, "Console", lambda stderr: Console(file=terminal, width=width, force_terminal=True, color_system=None)
    )
    bar = Screen(steps, 0)
    bar.step(done, FIELDS)
    assert bar._progress is not None
    console = Console(width=width, file=io.StringIO(), color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(bar._progress.get_renderable())
    bar.close()
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160, 300])
@pytest.mark.parametrize("steps", [120, 1_000_000])
def test_a_terminal_has_one_line_whatever_its_width(width: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = shown(width, monkeypatch, steps, done=steps - 1)
    assert len(line) <= width
    assert f"{steps - 1}/{steps}" in line
    assert all(field in line for field in FIELDS) == (width >= 160)
    assert ("loss 2.1992  grad norm 0.460" in line) >= (width >= 80)
    if width == 80 and steps == 120:
        assert line.rstrip().endswith("loss 2.1992  grad norm 0.460  7,483 tokens/s")


def test_fields_are_whole_and_in_their_order() -> None:
    fields = Fields(("a bc", "def", "g"))
    assert [fields.fitted(width) for width in (3, 4, 8, 9, 11, 12, 99)] == [
        "", "a bc", "a bc", "a bc  def", "a bc  def", "a bc  def  g", "a bc  def  g",
    ]  # fmt: skip


def test_where_there_is_no_terminal_a_step_is_a_line_with_all_fields(capsys: pytest.CaptureFixture[str]) -> None:
    plain = Screen(120, 0)
    plain.step(7, FIELDS)
    plain.say("said")
    plain.close()
    assert capsys.readouterr().err == f"step 7/120  {'  '.join(FIELDS)}\nsaid\n"
