"""The SVG is well-formed, and its rectangles are the timeline."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch
from helixpipe.predict.simulate import simulate_program, simulate_schedule
from helixpipe.predict.timeline import MemoryPoint, Span, Timeline
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.durations import unit_durations
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower
from helixpipe.view.svg import LEFT, RIGHT, WIDTH, render

NS = "{http://www.w3.org/2000/svg}"


def timeline_of(family: str, **given: object) -> Timeline:
    schedule = build_schedule(family, **given)
    return simulate_schedule(schedule, unit_durations(schedule))


def parsed(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{NS}svg"
    return root


def actions(root: ElementTree.Element) -> list[tuple[str, dict[str, str]]]:
    """(hover text, attributes) of the rectangles that are actions."""
    found = [(rect.find(f"{NS}title"), rect.attrib) for rect in root.iter(f"{NS}rect")]
    return [(title.text, attributes) for title, attributes in found if title is not None]


def texts(root: ElementTree.Element) -> list[str]:
    return [text.text for text in root.iter(f"{NS}text")]


def test_every_action_is_a_rectangle_at_its_time() -> None:
    timeline = timeline_of("helix", ranks=3, layers=4, microbatches=6)
    found = actions(parsed(render(timeline, "t", unit="units")))
    spans = [span for row in timeline.spans for span in row]
    assert len(found) == len(spans)
    per_unit = (WIDTH - LEFT - RIGHT) / timeline.makespan_s
    rows = set()
    for (hover, at), span in zip(found, spans, strict=True):
        assert hover == f"{span.action}  {span.start_s:g} to {span.end_s:g} units"
        assert float(at["x"]) == pytest.approx(LEFT + span.start_s * per_unit, abs=0.01)
        assert float(at["width"]) == pytest.approx((span.end_s - span.start_s) * per_unit, abs=0.85)
        rows.add(at["y"])
    assert len(rows) == 3


def test_caption_axis_and_legend() -> None:
    told = texts(parsed(render(timeline_of("1f1b", ranks=4, layers=4, microbatches=8), "a title", unit="units")))
    assert told[0] == "a title"
    assert told[1] == "makespan 198 units · bubble 27.3% · 4 ranks · 8 micro-batches"
    assert told[-2:] == ["forward", "backward"]
    assert told[-12:-2] == ["0 units", *(str(t) for t in range(20, 181, 20))]
    assert [text for text in told if text.startswith("rank")] == [f"rank {r}" for r in range(4)]
    assert [text for text in told if re.fullmatch(r"[FB]\d", text)]


def test_seconds_are_told_at_a_fitting_scale() -> None:
    schedule = build_schedule("gpipe", ranks=1, layers=1, microbatches=1)
    for length, told in {1.5: "3 s", 2e-3: "4 ms", 3.21e-6: "6.42 us"}.items():
        text = texts(parsed(render(simulate_schedule(schedule, lambda action, s=length: s), "t")))
        assert text[1] == f"makespan {told} · bubble 0.0% · 1 rank · 1 micro-batch"


def test_labels_are_left_out_where_they_do_not_fit() -> None:
    few, many = (timeline_of("helix", ranks=2, layers=layers, microbatches=4) for layers in (2, 64))
    assert sum(bool(re.fullmatch(r"\d+[FB]\d+", text)) for text in texts(parsed(render(few, "t")))) > 20
    assert not any(re.fullmatch(r"\d+[FB]\d+", text) for text in texts(parsed(render(many, "t"))))


def test_a_segment_is_told_where_its_label_does_not_fit() -> None:
    wide, narrow = (
        texts(parsed(render(timeline_of("seq1f1b", ranks=2, layers=2, microbatches=m), "t"))) for m in (4, 16)
    )
    assert "F0.1" in wide
    assert ".1" not in wide
    assert "F0.1" not in narrow
    assert narrow.count(".1") == 2 * 16


def test_the_split_backward_is_told_apart() -> None:
    root = parsed(render(timeline_of("zb_h1", ranks=2, layers=2, microbatches=3), "t"))
    assert texts(root)[-3:] == ["forward", "input gradient", "weight gradient"]
    fills = {hover.split()[0]: at["fill"] for hover, at in actions(root)}
    assert len({fills["0F0"], fills["0I0"], fills["0W0"]}) == 3


def test_stages_on_several_ranks_are_marked_and_only_they() -> None:
    assert "on several ranks" in render(timeline_of("helix", ranks=2, layers=2, microbatches=2), "t")
    assert "on several ranks" not in render(timeline_of("1f1b", ranks=2, layers=2, microbatches=2), "t")


def test_all_passes_have_a_place_in_the_legend() -> None:
    spans = tuple(Span(Action(0, kind, 0, 1), i, i + 1) for i, kind in enumerate(Pass))
    told = texts(parsed(render(Timeline((spans,)), "t")))
    assert told[-5:] == ["forward", "recompute", "backward", "input gradient", "weight gradient"]
    assert "F0.1" in told


def test_memory_is_drawn_under_each_rank_when_it_is_there() -> None:
    bare = timeline_of("1f1b", ranks=2, layers=2, microbatches=2)
    points = (MemoryPoint(0, 1 << 20), MemoryPoint(5, 2 << 20, 1 << 19, 1 << 19), MemoryPoint(9, 0))
    root = parsed(render(Timeline(bare.spans, (points, ())), "t", unit="units"))
    told = texts(root)
    assert told[1].endswith("peak 3 MiB of activations")
    assert "3 MiB" in told
    assert told[-2:] == ["activations", "message buffers"]
    heights = [path.attrib["d"] for path in root.iter(f"{NS}path")]
    assert len(heights) == 3  # rank 0: buffers on top of activations, and activations; rank 1: nothing but a line
    assert "activations" not in texts(parsed(render(bare, "t")))


def test_an_action_that_waited_says_for_what() -> None:
    program = lower(
        build_schedule("1f1b", ranks=2, layers=2, microbatches=1),
        ModelShape(layers=2, hidden=4, heads=1, ffn=4, vocabulary=5),
        Batch(1, (2,)),
    )
    timeline = simulate_program(program, lambda action: 1.0, lambda message: 1.0)
    hovers = [hover for hover, _ in actions(parsed(render(timeline, "t")))]
    assert "1F0  2 to 3 s, waited for x.1 of 0F0 from rank 0 to rank 1" in hovers


def test_titles_may_hold_anything() -> None:
    svg = render(timeline_of("gpipe", ranks=1, layers=1, microbatches=1), 'a < b & "c" > d')
    assert texts(parsed(svg))[0] == 'a < b & "c" > d'


def test_an_empty_timeline_is_an_empty_picture() -> None:
    assert "makespan 0" in texts(parsed(render(Timeline(()), "t")))[1]
    assert actions(parsed(render(Timeline(((), ())), "t"))) == []


def test_many_ranks_stay_readable_and_the_file_small() -> None:
    svg = render(timeline_of("1f1b", ranks=64, layers=64, microbatches=64), "t")
    root = parsed(svg)
    assert float(root.attrib["height"]) < 1200
    assert len(svg) < 150 * 64 * 64 * 2


@pytest.mark.parametrize("segments", [1, 2])
def test_units_follow_the_parts(segments: int) -> None:
    schedule = build_schedule("helix", ranks=2, layers=2, microbatches=1)
    orders = tuple(tuple(a._replace(segment=s) for a in order for s in range(segments)) for order in schedule.ranks)
    duration = unit_durations(type(schedule)(schedule.stages, orders))
    forward = [duration(Action(s, Pass.F, 0)) * segments for s in range(5)]
    assert forward == [1, 3, 3, 3, 2]  # embed norm qkv | attn | proj mlp norm qkv | attn | proj mlp head
    assert [duration(Action(1, kind, 0)) * segments for kind in map(Pass, "FBIWR")] == [3, 6, 3, 3, 3]
