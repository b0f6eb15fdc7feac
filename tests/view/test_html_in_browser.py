"""The page works in a browser, and reaches nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_html import timeline_of

from helixpipe.predict.timeline import Span, Standing, Timeline
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families import build_schedule
from helixpipe.view.html import page
from helixpipe.view.palette import colour


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, the system's or else Playwright's own; or a skip that says what to install."""
    missing = "the page was NOT opened in a browser: pip install playwright, and Debian's package chromium"
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        pytest.skip(missing)
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        try:
            chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags, timeout=60_000)
        except Error as error:
            if "Executable doesn't exist" not in str(error):
                raise
            pytest.skip(missing)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens a page from a file; afterwards it has asked for nothing else and complained of nothing."""
    contexts, requests, complaints = [], [], []

    def open_page(text: str, **options: Any) -> Any:
        (tmp_path / "page.html").write_text(text, encoding="utf-8")
        context = browser.new_context(viewport={"width": 1200, "height": 800}, **options)
        context.set_default_timeout(20_000)
        contexts.append(context)
        tab = context.new_page()
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto((tmp_path / "page.html").as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [(tmp_path / "page.html").as_uri()] * len(
        contexts
    )


def spot(tab: Any, lane: int, time_s: float, y: float = 8) -> tuple[float, float]:
    """Where on the screen a lane shows a time."""
    box = tab.locator(".lane canvas").nth(lane).bounding_box()
    view = tab.evaluate("helixpipe.view")
    return box["x"] + box["width"] * (time_s - view["from"]) / (view["to"] - view["from"]), box["y"] + y


def pixel(tab: Any, lane: int, time_s: float, y: float = 8) -> str:
    """`#rrggbb` of the lane's canvas there."""
    return pixels(tab, lane, [time_s], y)[0]


def pixels(tab: Any, lane: int, times_s: list[float], y: float = 8) -> list[str]:
    """The same, of many times."""
    code = """(canvas, [times, y]) => {
        const g = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
        g.drawImage(canvas, 0, 0);
        const { from, to } = helixpipe.view;
        return times.map((t) => [...g.getImageData((canvas.width * (t - from)) / (to - from), y, 1, 1).data].slice(0, 3));
    }"""
    found = tab.locator(".lane canvas").nth(lane).evaluate(code, [times_s, y])
    return ["#" + "".join(f"{channel:02x}" for channel in colours) for colours in found]


def settled(tab: Any) -> None:
    """Once what was asked for is drawn."""
    tab.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_actions_are_drawn_at_their_times_in_their_colours(opened: Any) -> None:
    timeline = timeline_of("helix", ranks=2, layers=2, microbatches=4)
    tab = opened(page({"predicted": timeline}, "t"))
    for rank, spans in enumerate(timeline.spans):
        found = pixels(tab, rank, [span.start_s + 0.2 * (span.end_s - span.start_s) for span in spans])
        assert found == [colour(span.action.kind, span.action.microbatch, 4) for span in spans]
        assert len(set(found)) == 8  # two passes of four micro-batches
    idle = next((a.end_s + b.start_s) / 2 for a, b in pairwise(timeline.spans[1]) if b.start_s > a.end_s)
    assert pixel(tab, 1, idle) == "#eff1f3"
    most = max(timeline.memory[0], key=lambda point: point.kept_bytes)
    assert pixel(tab, 0, most.time_s + 1e-5, 58) == "#6f9fd0"


def test_hovering_tells_the_action_and_what_it_waited_for(opened: Any) -> None:
    given = {"ranks": 2, "layers": 2, "microbatches": 2}
    stages = [str(stage) for stage in build_schedule("1f1b", **given).stages]
    both = {"predicted": timeline_of("1f1b", **given), "measured": timeline_of("1f1b", 1.5, **given)}
    tab = opened(page(both, "t", stages=stages))
    span = both["predicted"].spans[1][0]
    assert span.awaited
    tab.mouse.move(*spot(tab, 1, (span.start_s + span.end_s) / 2))
    terms = tab.locator("#tip dt").all_inner_texts()
    told = dict(zip(terms, tab.locator("#tip dd").all_inner_texts(), strict=True))
    assert tab.inner_text("#tip strong") == "1F0"
    assert told == {
        "rank": "1, predicted",
        "stage": f"1: {stages[1]}",
        "pass": "forward",
        "micro-batch": "0",
        "start": "6.5 ms",
        "end": "12.5 ms",
        "duration": "6 ms",
        "idle before": "6.5 ms",
        "waited for": "x.1 of 0F0 from rank 0 to rank 1",
        "measured": "9 ms, from 9.5 ms",
    }
    settled(tab)
    other = both["measured"].spans[1][0]  # the same action of the other timeline is outlined too
    assert pixel(tab, 3, (other.start_s + other.end_s) / 2, 1) == "#c2185b"
    faded = both["predicted"].spans[1][2]
    assert faded.action.microbatch == 1
    assert pixel(tab, 1, faded.start_s + 1e-3) != colour(Pass.F, 1, 2)
    tab.mouse.move(2, 2)
    assert tab.locator("#tip").is_hidden()


def test_wheel_drag_keys_and_buttons_move_the_view(opened: Any) -> None:
    timeline = timeline_of("1f1b", ranks=2, layers=2, microbatches=4)
    tab = opened(page({"predicted": timeline}, "t"))
    whole = timeline.makespan_s

    def view() -> tuple[float, float]:
        settled(tab)
        return tuple(tab.evaluate("[helixpipe.view.from, helixpipe.view.to]"))

    assert view() == (0, pytest.approx(whole))
    before = tab.inner_text("#range")
    tab.mouse.move(*spot(tab, 0, whole / 4))
    tab.mouse.wheel(0, -500)
    start, end = view()
    assert end - start == pytest.approx(whole / 2.718281828, rel=1e-3)
    assert (whole / 4 - start) / (end - start) == pytest.approx(0.25, abs=2e-3)  # what was under the cursor stays there
    assert tab.inner_text("#range") != before
    x, y = spot(tab, 0, (start + end) / 2)
    tab.mouse.down()
    tab.mouse.move(x - 100, y)
    tab.mouse.up()
    assert view() != (start, end)
    tab.mouse.dblclick(x, y)
    assert view() == (0, pytest.approx(whole))
    tab.click("#in")
    assert view() == (pytest.approx(whole / 4), pytest.approx(whole * 3 / 4))
    tab.keyboard.press("ArrowRight")
    assert view()[0] == pytest.approx(whole * (1 / 4 + 0.15 / 2))
    tab.keyboard.press("-")
    tab.click("#out")
    assert view() == (0, pytest.approx(whole))
    tab.keyboard.press("+")
    assert view()[0] == pytest.approx(0.15 * whole)
    tab.keyboard.press("0")
    assert view() == (0, pytest.approx(whole))
    tab.keyboard.press("n")
    tab.keyboard.press("n")
    assert tab.evaluate("helixpipe.hovered") == str(timeline.spans[0][1].action)


def test_dark_pages_are_dark_and_ranks_can_be_paired(opened: Any) -> None:
    timeline = timeline_of("1f1b", ranks=2, layers=2, microbatches=2)
    timeline = Timeline(timeline.spans, timeline.memory, (Standing(1 << 20, 1 << 20, 0),) * 2)
    tab = opened(page({"predicted": timeline, "measured": timeline}, "t"), color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    assert pixel(tab, 1, 1e-4) == "#262a31"
    assert "full height: 2." in tab.inner_text("#height")
    tab.click("#standing")
    assert "KiB" in tab.inner_text("#height")
    tab.click("#pair")
    lanes = tab.locator(".lane .name").evaluate_all(
        "all => all.map(e => e.querySelector('b').innerText + ' ' + e.querySelector('i').innerText)"
    )
    assert lanes == ["rank 0 predicted", "rank 0 measured", "rank 1 predicted", "rank 1 measured"]


COUNT = """() => {
    const draw = CanvasRenderingContext2D.prototype.fillRect;
    window.drawn = 0;
    CanvasRenderingContext2D.prototype.fillRect = function (...at) { window.drawn++; draw.apply(this, at); };
}"""


def test_many_more_actions_than_pixels_still_show_busy_and_idle(opened: Any) -> None:
    actions = [Action(0, Pass.F, microbatch) for microbatch in range(10_000)]
    spans = tuple(Span(a, i, i + 1) for i, a in enumerate(actions[:5_000])) + tuple(
        Span(a, i + 10_000, i + 10_001) for i, a in enumerate(actions[5_000:])
    )
    tab = opened(page({"a": Timeline((spans,))}, "t"))
    assert pixel(tab, 0, 7_500) == "#eff1f3"
    assert pixel(tab, 0, 2_500) != "#eff1f3" != pixel(tab, 0, 12_500)
    tab.evaluate(COUNT)
    tab.keyboard.press("+")
    settled(tab)
    assert 300 < tab.evaluate("window.drawn") < 1200  # a rectangle a column of pixels at most, not one an action


def test_hostile_texts_stay_texts_in_the_browser(opened: Any) -> None:
    bad = "</script><b onmouseover=alert(1)>x</b><img src=x onerror=alert(1)>"
    tab = opened(page({bad: Timeline(((Span(Action(0, Pass.F, 0), 0, 1, bad),),))}, bad, [(bad, bad)], stages=[bad]))
    tab.mouse.move(*spot(tab, 0, 0.5))
    assert tab.locator("#tip dd").all_inner_texts()[-1] == bad
    assert tab.title() == tab.inner_text("h1") == bad
    assert tab.locator("img").count() == 0


def test_empty_pages_open(opened: Any) -> None:
    tab = opened(page({"a": Timeline(())}, "t"))
    assert tab.inner_text("#range") == "0 to 1 s"
    opened(page({"a": Timeline(((), ()), ((), ()))}, "t"))
