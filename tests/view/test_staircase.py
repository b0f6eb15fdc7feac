"""Drawings in the terminal, as one would draw them by hand."""

from __future__ import annotations

import re
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helixpipe.predict.simulate import simulate_schedule
from helixpipe.predict.timeline import Span, Timeline
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families import build_schedule
from helixpipe.view.palette import TONES, colour, dark
from helixpipe.view.text import MOST_LINES, staircase


def lines(drawing: str) -> str:
    return textwrap.dedent(drawing).lstrip("\n")


def test_one_stage_a_rank_needs_no_stage_in_its_labels() -> None:
    assert staircase(build_schedule("1f1b", ranks=2, layers=2, microbatches=3)) == lines("""
        rank 0   F0 F1 .. B0 F2 B1 .. B2
        rank 1   .. F0 B0 F1 B1 F2 B2
    """)


def test_several_stages_a_rank_are_told_apart() -> None:
    assert staircase(build_schedule("helix", ranks=2, layers=1, microbatches=2, folds=1)) == lines("""
        rank 0   0F0 0F1 1F1 ... ... 1B1 0B1 0B0
        rank 1   ... 1F0 2F0 2F1 2B1 2B0 1B0
    """)


def test_segments_and_split_backward() -> None:
    assert staircase(build_schedule("seq1f1b_zb", ranks=2, layers=2, microbatches=1)) == lines("""
        rank 0   F0   F0.1 .... .... I0.1 W0.1 I0   W0
        rank 1   .... F0   F0.1 I0.1 I0   W0.1 W0
    """)


def test_labels_of_different_lengths_stand_in_columns() -> None:
    drawing = staircase(build_schedule("gpipe", ranks=1, layers=1, microbatches=11))
    assert drawing.startswith("rank 0   F0  F1  F2  F3  F4  F5  F6  F7  F8  F9  F10 B0  B1  ")


def test_a_timeline_is_drawn_by_its_clock() -> None:
    schedule = build_schedule("1f1b", ranks=2, layers=2, microbatches=2)
    assert staircase(simulate_schedule(schedule, lambda a: 0.25 if a.kind is Pass.F else 0.5)) == lines("""
        rank 0   F0 F1 .. .. B0--- .. B1---
        rank 1   .. F0 B0--- F1 B1---
    """)


def test_a_measured_timeline_keeps_to_its_proportions() -> None:
    spans = (
        (Span(Action(0, Pass.F, 0), 0.0, 0.1), Span(Action(0, Pass.B, 0), 0.537, 0.71)),
        (Span(Action(1, Pass.F, 0), 0.171, 0.28), Span(Action(1, Pass.B, 0), 0.281, 0.5)),
    )
    assert staircase(Timeline(spans)) == lines("""
        rank 0   F0 ............ B0--
        rank 1   .... F0 B0----
    """)


def test_actions_too_short_for_a_label_show_their_pass() -> None:
    spans = [Span(Action(0, Pass.F, mb), mb / 100, (mb + 1) / 100) for mb in range(3)]
    spans += [Span(Action(0, Pass.B, mb), 0.07 + mb / 2.98, 0.07 + (mb + 1) / 2.98) for mb in range(30)]
    drawing = staircase(Timeline((tuple(spans),)), width=60)
    assert "FFF" not in drawing  # less than half a column each: not drawn at all
    assert "B29" in drawing


def test_wide_drawings_go_on_below_in_bands_of_equal_length() -> None:
    schedule = build_schedule("1f1b", ranks=3, layers=3, microbatches=4)
    assert staircase(schedule, width=30) == lines("""
        from action 0
        rank 0   F0 F1 F2 .. .. B0
        rank 1   .. F0 F1 .. B0 F2
        rank 2   .. .. F0 B0 F1 B1

        from action 6
        rank 0   F3 B1 .. B2 .. B3
        rank 1   B1 F3 B2 .. B3
        rank 2   F2 B2 F3 B3
    """)


def test_an_action_cut_by_a_band_goes_on_in_the_next() -> None:
    schedule = build_schedule("gpipe", ranks=1, layers=1, microbatches=4)
    timeline = simulate_schedule(schedule, lambda a: 1.0 if a.kind is Pass.F else 3.0)
    assert staircase(timeline, width=33) == lines("""
        from 0 s
        rank 0   F0 F1 F2 F3 B0------ B1-

        from 8 s
        rank 0   ----- B2------ B3------
    """)


def test_what_would_need_too_many_lines_is_compressed_and_says_so() -> None:
    schedule = build_schedule("helix", ranks=8, layers=32, microbatches=16)
    drawing = staircase(schedule, width=100).splitlines()
    assert len(drawing) == 9
    assert re.fullmatch(r"rank 0   F+B+", drawing[0])
    assert re.fullmatch(r"rank 3   \.+F+\.+B+", drawing[3])
    assert drawing[-1] == "compressed: a column is 3.2 actions; labels are left out"


def test_a_compressed_drawing_is_no_wider_either() -> None:
    drawing = staircase(build_schedule("gpipe", ranks=9, layers=9, microbatches=11), width=36)  # was 37 wide
    assert max(map(len, drawing.splitlines()[:-1])) == 36


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["gpipe", "1f1b", "helix", "seq1f1b", "zb_h1"]),
    st.integers(1, 12),
    st.integers(1, 30),
    st.integers(1, 220),
    st.booleans(),
)
def test_no_line_is_wider_than_asked(family: str, ranks: int, microbatches: int, width: int, timed: bool) -> None:
    schedule = build_schedule(family, ranks=ranks, layers=ranks, microbatches=microbatches)
    drawn = simulate_schedule(schedule, lambda a: 1.0 + a.stage % 3 / 7) if timed else schedule
    drawing = staircase(drawn, width=width)
    assert drawing.isascii()
    body = [line for line in drawing.splitlines() if line.startswith("rank")]
    assert max(map(len, body)) <= max(width, 30)
    assert len(drawing.splitlines()) <= MOST_LINES or len(body) == ranks
    assert len(body) % ranks == 0


@given(st.integers(1, 6), st.integers(1, 8))
def test_every_action_is_drawn_once_when_nothing_is_compressed(ranks: int, microbatches: int) -> None:
    schedule = build_schedule("helix", ranks=ranks, layers=ranks, microbatches=microbatches)
    drawing = staircase(schedule)
    drawn = [[cell for cell in line.split()[2:] if cell.strip(".")] for line in drawing.splitlines()]
    assert drawn == [[str(action) for action in order] for order in schedule.ranks]


def test_nothing_to_draw() -> None:
    assert staircase(Timeline(((), ()))) == "nothing to draw: no action takes any time\n"
    schedule = build_schedule("gpipe", ranks=1, layers=1, microbatches=1)
    assert staircase(simulate_schedule(schedule, lambda action: 0.0)).startswith("nothing to draw")


def test_colour_adds_nothing_but_colour() -> None:
    for schedule in (
        build_schedule("1f1b", ranks=3, layers=3, microbatches=12),
        build_schedule("helix", ranks=8, layers=32, microbatches=16),
    ):
        coloured = staircase(schedule, width=80, color=True)
        assert "\x1b[" in coloured
        bare = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
        assert [line.rstrip() for line in bare.splitlines()] == staircase(schedule, width=80).splitlines()


def test_the_last_cell_of_a_row_is_painted_as_wide_as_the_others() -> None:
    coloured = staircase(build_schedule("gpipe", ranks=1, layers=1, microbatches=11), color=True).splitlines()
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured[0]).endswith("B9  B10")
    coloured = staircase(build_schedule("seq1f1b", ranks=1, layers=1, microbatches=2), color=True).splitlines()
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured[0]).endswith("B1.1 B1  ")


def test_colour_is_asked_for_and_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")  # the caller has decided already
    assert "\x1b[" in staircase(build_schedule("gpipe", ranks=1, layers=1, microbatches=1), color=True)


def test_passes_differ_in_lightness_and_micro_batches_in_hue() -> None:
    def light(code: str) -> float:
        channels = [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for m in (1, 2, 16):
        forward = [light(colour(Pass.F, mb, m)) for mb in range(m)]
        backward = [light(colour(Pass.B, mb, m)) for mb in range(m)]
        assert min(forward) > 2 * max(backward)
        assert len({colour(Pass.F, mb, m) for mb in range(m)}) == m
    for kind in TONES:  # the ink on it has the contrast that is asked of text, 4.5 to 1; 3 to 1 for the middle tone
        for mb in range(16):
            ink = 1.0 if dark(kind) else 0.0
            high, low = sorted((light(colour(kind, mb, 16)), ink), reverse=True)
            assert (high + 0.05) / (low + 0.05) > 3
