"""Timelines as one HTML page that needs nothing else: no network, no font, no library.

    title                                    what the page is of, by name and value
    [+] [-] [all]  0 to 12.3 ms              legend
         0        2        4        6 ms     the axis stays while one scrolls
    rank 0  |F0|F1|F2|      |B0 |F3|B1 |     predicted; a lane a rank, its live bytes below
            ~~~~~~~~~~~~~~~~~~~~~~~~~~~~
    rank 0  |F0|F1|F2|       |B0 |F3|B1 |    measured, on the same scale
    table of ranks

This file writes what is text: head, legend, names, table, and the timelines as JSON. The scripts of page/ draw the lanes
from that JSON onto canvases, only what is in sight; page.css has both colour schemes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from helixpipe.errors import ConfigError
from helixpipe.predict.timeline import Timeline
from helixpipe.view.figures import byte_scale, count, time_scale
from helixpipe.view.palette import NAMES, TONES, colour, dark
from helixpipe.view.rank_table import rank_table

# nothing may be fetched, whatever a browser or its extensions think of
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
SCRIPTS = ("lanes.js", "draw.js", "tooltip.js", "hands.js")  # one after the other, they are one script
HELP = "Wheel or + and -: zoom. Drag or arrow keys: move. Double click or 0: all. n and p: next and previous action."


def page(
    timelines: Mapping[str, Timeline],
    title: str,
    facts: Sequence[tuple[str, str]] = (),
    unit: str = "s",
    stages: Sequence[str] = (),
) -> str:
    """The page of one timeline, or of two over one another (as in `{"predicted": ..., "measured": ...}`).

    `facts` are names and values for the head; `stages[s]` tells stage s's parts, where known. `unit` names the
    timelines' unit of time: seconds are shown at a fitting scale, others as they are. Raises ConfigError.
    """
    if len(timelines) not in (1, 2):
        raise ConfigError(f"page: {len(timelines)} timelines; a page shows one, or two over one another")
    data = _data(timelines, unit, stages)
    told = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{_asset("page.css")}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{f'<dl class="facts">{told}</dl>' if told else ""}
</header>
<main>
<div class="bar">
{_buttons(timelines)}
<output id="range" aria-live="polite"></output>
</div>
<ul class="legend" aria-label="legend">{"".join(_legend(timelines, data))}</ul>
<noscript><p>The drawing needs JavaScript; the table below does not.</p></noscript>
<div id="chart" tabindex="0" role="group" aria-label="timeline" aria-describedby="help">
<div id="axis"><div class="name"></div><div class="track"><canvas aria-hidden="true"></canvas><div id="window"></div></div></div>
<div id="lanes">
{chr(10).join(_lanes(timelines, unit))}
</div>
<div id="cursor" hidden></div>
</div>
<p id="help">{escape(HELP)}</p>
{rank_table(timelines, unit)}
</main>
<div id="tip" role="tooltip" aria-live="polite" hidden></div>
<script type="application/json" id="data">{_embedded(data)}</script>
<script>
"use strict";
(() => {{
{chr(10).join(map(_asset, SCRIPTS))}}})();
</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return files("helixpipe.view").joinpath("page", name).read_text(encoding="utf-8")


def _embedded(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _data(timelines: Mapping[str, Timeline], unit: str, stages: Sequence[str]) -> dict[str, Any]:
    """What the scripts read: colours and names once, then every span and memory point as short rows."""
    everything = [span.action for t in timelines.values() for spans in t.spans for span in spans]
    microbatches = 1 + max((action.microbatch for action in everything), default=0)
    kinds = [kind for kind in TONES if any(action.kind is kind for action in everything)]
    return {
        "unit": unit,
        "stages": list(stages),
        "segments": 1 + max((action.segment for action in everything), default=0),
        "moving": sorted(_on_several_ranks(timelines)),
        "passes": {
            kind.value: {
                "name": NAMES[kind],
                "dark": dark(kind),
                "colours": [colour(kind, microbatch, microbatches) for microbatch in range(microbatches)],
            }
            for kind in kinds
        },
        "timelines": [
            {
                "name": name,
                "makespan": _short(timeline.makespan_s),
                "spans": [
                    [
                        [*a, _short(start), _short(end), *([awaited] if awaited else [])]
                        for a, start, end, awaited in spans
                    ]
                    for spans in timeline.spans
                ],
                "memory": [[[_short(point.time_s), *point[1:]] for point in points] for points in timeline.memory],
                "standing": [sum(stands) for stands in timeline.standing],
            }
            for name, timeline in timelines.items()
        ],
    }


def _short(time: float) -> float:
    """Nine digits: the page stays small, and neighbours still meet."""
    return float(f"{time:.9g}")


def _on_several_ranks(timelines: Mapping[str, Timeline]) -> set[int]:
    """Stages that more than one rank of a timeline runs."""
    found = set()
    for timeline in timelines.values():
        seen: set[int] = set()
        for spans in timeline.spans:
            here = {span.action.stage for span in spans}
            found |= seen & here
            seen |= here
    return found


def _buttons(timelines: Mapping[str, Timeline]) -> str:
    """What the keys do, for a pointer."""
    told = [("in", "+", "zoom in"), ("out", "−", "zoom out"), ("all", "all", "show the whole step")]
    buttons = [
        f'<button type="button" id="{key}" aria-label="{says}" title="{says}">{face}</button>'
        for key, face, says in told
    ]
    toggles = [("pair", "rank beside rank", False)] if len(timelines) == 2 else []
    toggles += (
        [("standing", "standing bytes", True)] if any(t.standing and any(t.memory) for t in timelines.values()) else []
    )
    buttons += [
        f'<button type="button" id="{key}" aria-pressed="{str(on).lower()}">{face}</button>'
        for key, face, on in toggles
    ]
    return "".join(buttons)


def _legend(timelines: Mapping[str, Timeline], data: dict[str, Any]) -> Iterator[str]:
    """What is in the picture, and only that."""
    for told in data["passes"].values():
        several = [told["colours"][i * (len(told["colours"]) - 1) // 3] for i in range(4)]
        yield _item("".join(f'<i style="background:{fill}"></i>' for fill in dict.fromkeys(several)), told["name"])
    if any(len(told["colours"]) > 1 for told in data["passes"].values()):
        yield _item("", "hue: micro-batch")
    if data["segments"] > 1:
        yield _item('<i class="segment"></i>', f"segment, of {data['segments']}")
    if data["moving"]:
        yield _item('<i class="moving"></i>', "stage on several ranks")
    yield _item('<i class="idle"></i>', "idle")
    points = [point for t in timelines.values() for rank in t.memory for point in rank]
    if points:
        yield _item('<i class="activations"></i>', "activations")
    if any(point.transit_bytes for point in points):
        yield _item('<i class="buffers"></i>', "message buffers")
    if points and any(t.standing for t in timelines.values()):
        yield _item('<i class="stands"></i>', "weights, gradients, optimizer")
    if points:
        yield '<li id="height"></li>'


def _item(swatch: str, name: str) -> str:
    return f"<li>{swatch}{escape(name)}</li>"


def _lanes(timelines: Mapping[str, Timeline], unit: str) -> Iterator[str]:
    """A heading a timeline, a lane a rank."""
    time = time_scale(max(t.makespan_s for t in timelines.values()), unit)
    size = byte_scale(max((b for t in timelines.values() for b in t.peak_activation_bytes), default=0))
    for number, (name, timeline) in enumerate(timelines.items()):
        facts = [
            f"makespan {time.told(timeline.makespan_s)}",
            f"bubble {timeline.bubble_ratio:.1%}",
            count(timeline.ranks, "rank"),
        ]
        facts += [f"peak {size.told(max(timeline.peak_activation_bytes))} of activations"] if timeline.memory else []
        yield f"<h2>{escape(name)} <small>{escape(' · '.join(facts))}</small></h2>"
        for rank, spans in enumerate(timeline.spans):
            peak = size.told(timeline.peak_activation_bytes[rank]) if timeline.memory else ""
            busy = timeline.busy_s[rank] / (timeline.makespan_s or 1.0)
            told = f"{name}, rank {rank}: {count(len(spans), 'action')}, busy {busy:.1%}"
            told += f", peak {peak} of activations" if peak else ""
            yield (
                f'<div class="lane" data-timeline="{number}" data-rank="{rank}"><div class="name"><b>rank {rank}</b>'
                f"<i>{escape(name)}</i>{f'<small>{peak}</small>' if peak else ''}</div>"
                f'<div class="track"><canvas role="img" aria-label="{escape(told)}"></canvas></div></div>'
            )
