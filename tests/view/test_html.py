"""The page holds every action and harms nobody. In a browser: test_html_in_browser.py."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from typing import Any

import pytest

from helixpipe.errors import ConfigError
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Keeping
from helixpipe.predict.simulate import simulate_program, simulate_schedule
from helixpipe.predict.timeline import MemoryPoint, Span, Standing, Timeline
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.durations import unit_durations
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower
from helixpipe.view.html import page
from helixpipe.view.palette import colour

GIB = 2**30


def timeline_of(family: str, slower: float = 1.0, **given: Any) -> Timeline:
    """A millisecond a unit, messages of half of one, and live bytes."""
    schedule = build_schedule(family, **given)
    shape = ModelShape(layers=schedule.layers, hidden=8, heads=1, ffn=16, vocabulary=32)
    program = lower(schedule, shape, Batch(1, (4,) * schedule.segments))
    units = unit_durations(schedule)
    return simulate_program(
        program,
        lambda action: 1e-3 * slower * units(action),
        lambda message: 0.5e-3,
        lambda message: 1 << 10,
        Keeping("selective"),
    )


class Page(HTMLParser):
    """What a page says, by element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "link"):
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag

    def handle_data(self, text: str) -> None:
        self.texts.append((self.inside[-1] if self.inside else "", text))

    def of(self, tag: str) -> list[str]:
        return [text for inside, text in self.texts if inside == tag]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.of("script")[0])

    @property
    def rows(self) -> list[str]:
        """The table's rows, cells joined by blanks."""
        cells = [(inside, text) for inside, text in self.texts if inside in ("th", "td")]
        told: list[list[str]] = []
        for inside, text in cells:
            if inside == "th" and re.match(r"rank \d|mean|most", text):
                told.append([])
            if told:
                told[-1].append(text)
        return [" ".join(row) for row in told]


def spans_of(data: Mapping[str, Any], which: int) -> list[list[Span]]:
    """The JSON's spans as they were."""
    return [
        [Span(Action(s, Pass(k), m, g), a, b, *waited) for s, k, m, g, a, b, *waited in rank]
        for rank in data["timelines"][which]["spans"]
    ]


def test_every_action_is_in_the_page_once() -> None:
    predicted = timeline_of("helix", ranks=3, layers=4, microbatches=6)
    measured = timeline_of("helix", 1.1, ranks=3, layers=4, microbatches=6)
    data = Page(page({"predicted": predicted, "measured": measured}, "t")).data
    assert [t["name"] for t in data["timelines"]] == ["predicted", "measured"]
    for which, timeline in enumerate((predicted, measured)):
        for told, spans in zip(spans_of(data, which), timeline.spans, strict=True):
            assert [(s.action, s.awaited) for s in told] == [(s.action, s.awaited) for s in spans]
            assert [s.start_s for s in told] == pytest.approx([s.start_s for s in spans], rel=1e-8)
            assert [s.end_s for s in told] == pytest.approx([s.end_s for s in spans], rel=1e-8)
    assert any(span.awaited for rank in spans_of(data, 0) for span in rank)
    assert data["timelines"][0]["memory"][0][1][1:] == list(predicted.memory[0][1][1:])


def test_colours_are_the_palettes() -> None:
    data = Page(page({"a": timeline_of("zb_h1", ranks=2, layers=2, microbatches=3)}, "t")).data
    assert list(data["passes"]) == ["F", "I", "W"]
    for kind, told in data["passes"].items():
        assert told["colours"] == [colour(Pass(kind), microbatch, 3) for microbatch in range(3)]


def test_head_and_lanes_are_told_in_words() -> None:
    timeline = timeline_of("1f1b", ranks=2, layers=2, microbatches=4)
    told = Page(page({"predicted": timeline}, "my page", [("model", "tiny")]))
    assert told.of("title") == told.of("h1") == ["my page"]
    assert (told.of("dt"), told.of("dd")) == (["model"], ["tiny"])
    labels = [at.get("aria-label") for tag, at in told.elements if tag == "canvas" and at.get("role") == "img"]
    assert labels == [
        f"predicted, rank {rank}: 8 actions, busy {timeline.busy_s[rank] / timeline.makespan_s:.1%}, "
        f"peak {timeline.peak_activation_bytes[rank] / 1024:.4g} KiB of activations"
        for rank in range(2)
    ]
    legend = [text for text in told.of("li") if text]
    assert legend == ["forward", "backward", "hue: micro-batch", "idle", "activations", "message buffers"]


def test_the_legend_has_segments_and_moving_stages_only_where_they_are() -> None:
    bare = [simulate_schedule(s, unit_durations(s)) for s in (
        build_schedule("seq1f1b", ranks=2, layers=2, microbatches=2, segments=4),
        build_schedule("helix", ranks=2, layers=2, microbatches=4),
    )]  # fmt: skip
    segments, helix = (Page(page({"t": timeline}, "t", unit="units")).of("li") for timeline in bare)
    assert segments == ["forward", "backward", "hue: micro-batch", "segment, of 4", "idle"]
    assert helix == ["forward", "backward", "hue: micro-batch", "stage on several ranks", "idle"]


def two_by_hand() -> dict[str, Timeline]:
    """Two ranks, 4 s: rank 0 works 3 of them, rank 1 all; measured, one works half a second more."""
    f, b = Action(0, Pass.F, 0), Action(0, Pass.B, 0)
    points = ((MemoryPoint(0, 0), MemoryPoint(1, GIB, GIB), MemoryPoint(2, 3 * GIB, 0)), (MemoryPoint(0, GIB),))
    standing = (Standing(GIB, GIB, 2 * GIB), Standing(0, 0, 0))
    spans = ((Span(f, 0, 1), Span(b, 2, 4)), (Span(f, 0, 1), Span(b, 1, 4)))
    longer = ((Span(f, 0, 1), Span(b, 1.5, 4)), spans[1])
    return {"predicted": Timeline(spans, points, standing), "measured": Timeline(longer, points)}


def test_the_table_of_one_timeline() -> None:
    told = Page(page({"predicted": two_by_hand()["predicted"]}, "t"))
    assert told.rows == [
        "rank 0 3 1 25 3 7",
        "rank 1 4 0 0 1 1",
        "mean 3.500 0.500 12.50 2 4",
        "most 4 1 25 3 7",
    ]
    assert told.of("caption") == ["Ranks"]


def test_the_table_of_two_has_them_beside_each_other_and_their_ratio() -> None:
    told = Page(page(two_by_hand(), "t"))
    assert told.of("caption") == ["Ranks; ratio is predicted / measured"]
    assert told.rows[0] == "rank 0 3.000 3.500 0.857 1.000 0.500 2.000 25.00 12.50 2.000 3 3 1.000 7 – –"
    assert told.rows[1] == "rank 1 4.000 4.000 1.000 0.000 0.000 – 0.00 0.00 – 1 1 1.000 1 – –"


def test_what_has_no_memory_has_no_columns_of_it() -> None:
    bare = {"a": Timeline(two_by_hand()["predicted"].spans)}
    told = Page(page(bare, "t", unit="units"))
    assert told.rows[0] == "rank 0 3 1 25"
    assert [text for text in told.of("small") if "[" in text] == ["[units]", "[units]", "[%]"]


def test_nothing_in_it_can_break_out() -> None:
    bad = "</script><b onmouseover=alert(1)>\"&'"
    timeline = Timeline(((Span(Action(0, Pass.F, 0), 0, 1, bad),),))
    text = page({bad: timeline}, bad, [(bad, bad)], unit=bad, stages=[bad])
    told = Page(text)
    assert "b" not in {tag for tag, at in told.elements if at}  # the only <b> are ours, without attributes
    assert all(not name.startswith("on") for _, at in told.elements for name in at)
    assert told.of("title") == told.of("h1") == told.of("dt") == told.of("dd") == [bad]
    assert len(told.of("script")) == text.count("</script>") == 2
    assert told.data["stages"] == [told.data["timelines"][0]["name"]] == [bad]
    assert told.inside == []


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = page({"a": timeline_of("1f1b", ranks=2, layers=2, microbatches=2)}, "t")
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|url\(|@import|\bsrc=|fetch\(|XMLHttp", text)


def test_the_same_timeline_makes_the_same_page() -> None:
    first, second = (page({"a": timeline_of("helix", ranks=2, layers=2, microbatches=4)}, "t") for _ in range(2))
    assert first == second


def test_a_thousand_actions_are_a_small_page() -> None:
    timeline = timeline_of("seq1f1b_interleaved", ranks=8, layers=16, microbatches=8, segments=4, stages_per_rank=2)
    assert sum(map(len, timeline.spans)) == 1024
    assert len(page({"predicted": timeline}, "t")) < 500_000


def test_an_empty_timeline_is_a_page() -> None:
    for timeline in (Timeline(()), Timeline(((), ()), ((), ()))):
        assert "makespan 0 s" in page({"a": timeline}, "t")


@pytest.mark.parametrize("count", [0, 3])
def test_a_page_is_of_one_timeline_or_two(count: int) -> None:
    with pytest.raises(ConfigError, match=f"^page: {count} timelines; a page shows one, or two over one another$"):
        page({str(i): Timeline(()) for i in range(count)}, "t")
