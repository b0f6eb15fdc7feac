"""Timelines as files, for every command that has one to show."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from helixpipe.files import write_text
from helixpipe.flags import Parser
from helixpipe.predict.timeline import Timeline
from helixpipe.view.html import page
from helixpipe.view.perfetto import perfetto
from helixpipe.view.svg import render


def add_picture_flags(parser: Parser) -> None:
    parser.add_argument("--svg", metavar="FILE", help="write a picture")
    parser.add_argument("--html", metavar="FILE", help="write a page to zoom into: one file, for any browser")
    parser.add_argument("--perfetto", metavar="FILE", help="write a trace that ui.perfetto.dev opens")


def write_pictures(
    args: argparse.Namespace,
    timelines: Mapping[str, Timeline],
    title: str,
    stages: Sequence[str] = (),
    facts: Sequence[tuple[str, str]] = (),
    unit: str = "s",
) -> None:
    """Those that the flags ask for. The SVG shows the last timeline alone. All are made before one is written."""
    made = {}
    if args.svg is not None:
        made[args.svg] = render(list(timelines.values())[-1], title, unit=unit)
    if args.html is not None:
        made[args.html] = page(timelines, title, facts, unit, stages)
    if args.perfetto is not None:
        made[args.perfetto] = perfetto(timelines, stages)
    for path, text in made.items():
        write_text(path, text)
