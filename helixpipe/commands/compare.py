"""`helixpipe compare RUN`"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from helixpipe.commands.pictures import add_picture_flags, write_pictures
from helixpipe.commands.setting import ONLY_RATIOS, as_flags, duration, gibibytes, load_profile
from helixpipe.config import Config
from helixpipe.config_text import build_config, read_saved
from helixpipe.errors import ConfigError
from helixpipe.files import json_text
from helixpipe.flags import Parser
from helixpipe.parts.work import Lengths
from helixpipe.predict.estimate import priced
from helixpipe.predict.hardware import named_accelerator, named_link
from helixpipe.predict.replay import replayed
from helixpipe.predict.steps import step_batches
from helixpipe.predict.timeline import Timeline
from helixpipe.predict.timeline_text import load
from helixpipe.schedule.lower import lower

ABOUT = "A run's measured step beside the predicted one, number by number."
EPILOG = """\
Without --profile and --hardware the prediction takes this step's own action times (the median of each stage, pass and
segment, over micro-batches that are alike) and free messages: what then differs is waiting and the runtime itself, not the
speed of the machine. Where documents were masked, the run's data is opened: the step is predicted with its own documents.
"""


def compare(given: list[str]) -> int:
    """`helixpipe compare RUN`"""
    parser = Parser("compare", "RUN [options]", ABOUT, EPILOG)
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--profile", metavar="FILE", help="predict from measured part costs, of helixpipe profile")
    parser.add_argument("--hardware", metavar="NAME", help="or from an accelerator's rates")
    parser.add_argument("--link", metavar="NAME", help="between ranks, with one of these [the profile's; else free]")
    add_picture_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.read(given)
    folder = Path(args.run)
    if not os.path.isfile(folder / "config.toml"):
        raise ConfigError(f"{folder}: no config.toml there; name a run folder, such as runs/default-1")
    config = build_config(read_saved(folder / "config.toml"))
    measured = load(folder / "timeline.json")
    with as_flags():
        predicted, source = _predicted(config, measured, args.profile, args.hardware, args.link)
    if predicted.order != measured.order:
        raise ConfigError(f"{folder}: config.toml and timeline.json are not of one run: their actions differ")
    rows = _rows(predicted, measured)
    only_ratios = args.hardware is not None and named_accelerator(args.hardware).only_ratios
    title = f"{folder.name}: {config.schedule.family} on {config.schedule.ranks} ranks"
    stages = tuple(map(str, config.build_schedule().stages))
    write_pictures(args, {"predicted": predicted, "measured": measured}, title, stages, [("predicted from", source)])
    if args.json:
        print(json_text({"run": str(folder), "predicted_from": source, "only_ratios": only_ratios, "numbers": rows}))
        return 0
    print(f"{folder}: {config.schedule.family}, {config.schedule.ranks} ranks; predicted from {source}")
    print(f"{ONLY_RATIOS}\n" if only_ratios else "")
    print(f"{'':<28} {'predicted':>12} {'measured':>12} {'ratio':>7}")
    for row in rows:
        show = (
            gibibytes
            if row["name"].endswith("bytes")
            else (duration if row["name"].endswith("_s") else "{:.4f}".format)
        )
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f}"
        print(f"{_label(row):<28} {show(row['predicted']):>12} {show(row['measured']):>12} {ratio:>7}")
    return 0


def _label(row: dict[str, Any]) -> str:
    name = row["name"].removesuffix("_s").replace("_", " ")
    return name if row["rank"] is None else f"rank {row['rank']} {name}"


def _rows(predicted: Timeline, measured: Timeline) -> list[dict[str, Any]]:
    """Every number there is of both."""

    def row(name: str, rank: int | None, a: float, b: float) -> dict[str, Any]:
        return {"name": name, "rank": rank, "predicted": a, "measured": b, "ratio": a / b if b else None}

    rows = [
        row("makespan_s", None, predicted.makespan_s, measured.makespan_s),
        row("bubble_ratio", None, predicted.bubble_ratio, measured.bubble_ratio),
    ]
    for name in ("busy_s", "idle_s", "peak_activation_bytes"):
        pairs = zip(getattr(predicted, name), getattr(measured, name), strict=True)
        rows += [row(name, rank, a, b) for rank, (a, b) in enumerate(pairs)]
    return rows


def _device(config: Config) -> str:
    """What the run computed on, if that was here."""
    if config.runtime.device != "auto":
        return config.runtime.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _predicted(
    config: Config, measured: Timeline, profile: str | None, hardware: str | None, link: str | None
) -> tuple[Timeline, str]:
    """The step as it should have been, and what that was computed from."""
    if profile is not None and hardware is not None:
        raise ConfigError("profile, hardware: both are given; choose one")
    if link is not None and profile is None and hardware is None:
        raise ConfigError("link: messages of a replay take no time; give --profile or --hardware with it")
    setting = config.setting(_device(config))
    schedule = config.build_schedule()
    documents = _documents(config)
    # cut as the run cut them; the measured pipeline is the first replica's
    batches = step_batches(setting, schedule, documents)[0]
    if (order := config.order_of_steps(schedule)) is not None:
        schedule = order(batches)
    joined = None if link is None else named_link(link)
    if profile is not None:
        costs = load_profile(profile)
        costs.check_fits(setting.shape, dtype=config.runtime.dtype)
        keeping = replace(setting.keeping, device=costs.device_type)
        setting = replace(setting, profile=costs, keeping=keeping, link=joined or costs.link or named_link("free"))
        source = f"the profile {profile}"
    elif hardware is not None:
        accelerator = named_accelerator(hardware)
        setting = replace(
            setting,
            accelerator=accelerator,
            profile=None,
            keeping=replace(setting.keeping, device=accelerator.device),
            link=joined or named_link("free"),
            tensor_link=named_link(accelerator.tensor_link),
        )
        source = hardware
    else:
        return replayed(schedule, measured, setting, documents), "this step's own action times"
    setting = replace(setting, link=replace(setting.link, communicators=config.runtime.communicators))
    return priced(lower(schedule, setting.shape, batches), setting).timeline, source


def _documents(config: Config) -> Lengths:
    """Of the rows of the step that was measured; none where attention went across them."""
    if not config.data.masks_documents:
        return ()
    from helixpipe.train.data import open_corpus

    return open_corpus(config).reading.documents(config.run.timeline_step)
