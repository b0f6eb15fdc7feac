"""`helixpipe plan`"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from helixpipe.commands.documents import ACROSS, Read, add_data_flags, data_from, open_reading, packing_told
from helixpipe.commands.setting import (
    ONLY_RATIOS,
    add_setting_flags,
    as_flags,
    dtype_of,
    duration,
    gibibytes,
    setting_from,
)
from helixpipe.config import Config
from helixpipe.config_data import DataConfig
from helixpipe.config_text import build_config, write_toml
from helixpipe.errors import ConfigError
from helixpipe.files import json_text, write_text
from helixpipe.flags import Parser, decimal, number
from helixpipe.parts.work import Lengths
from helixpipe.predict.estimate import Setting
from helixpipe.predict.plan import Choice, Plan
from helixpipe.predict.plan import plan as search
from helixpipe.view.front import picture

ABOUT = "The best schedules for a model, a sequence length, a cluster and its memory: every family with its options."
EPILOG = """\
Each schedule is lowered to the program that training would run, and simulated: step time, and every rank's bytes of weights,
gradients, optimizer, activations and messages. fsdp and context_parallel are priced on the same accelerators beside them.
What a CUDA context, libraries' buffers, passing gradients and fragmentation take is not in these bytes: without --memory,
8% of the hardware's is kept free for them.
With --data all schedules are priced as if every micro-batch were the one of mean work; the fastest that fit, and those that
nothing beats in both time and memory, then on the first --steps steps of a run over the documents that training would read.
"""
STEPS = 4
RESERVE = 0.08


def plan(given: list[str]) -> int:
    """`helixpipe plan ...`"""
    args = _parser().read(given)
    with as_flags(family="--families"):
        setting = setting_from(args)
        memory_bytes = setting.accelerator.memory_bytes * (1 - RESERVE) if args.memory is None else args.memory * 2**30
        if not memory_bytes > 0:
            raise ConfigError(f"memory: {args.memory:g} GiB; give more than 0")
        if args.processes < 0:
            raise ConfigError(f"processes: {args.processes}; give at least 1, or 0 for one a core")
        only = tuple(args.families.split(",")) if args.families else ()
        processes = args.processes or min(8, os.cpu_count() or 1)
        read = data_from(args, STEPS)
        steps = () if read is None else _steps(setting, args.ranks, args.microbatches, read)
        begun = time.monotonic()
        found = search(setting, args.ranks, args.microbatches, memory_bytes, only, processes, _progress, steps)
        taken_s = time.monotonic() - begun
        if not found.is_answer:
            _ = found.best  # raises, and says why
    if args.json:
        data = None if read is None else _data_as_json(*read)
        print(json_text([_as_json(choice, setting) | ({"data": data} if data else {}) for choice in found.fits]))
    else:
        print("\n".join(_table(found, setting, args, taken_s, [] if read is None else _data_told(found, *read))))
    # an answer that is no pipeline is told above; it has no config
    if args.svg is not None:
        write_text(args.svg, picture(found, _title(args)))
    if args.config is not None:
        with as_flags():
            write_text(args.config, write_toml(_config(found.best, args, dtype_of(setting), read)))
    return 0


def _steps(setting: Setting, ranks: int, microbatches: int, read: Read) -> tuple[Lengths, ...]:
    """The documents of the steps that schedules are ranked by."""
    if ranks < 1 or microbatches < 1:
        return ()  # the search refuses it
    reading = open_reading(read.data, setting, microbatches, read.seed)
    return tuple(reading.documents(number) for number in range(1, read.steps + 1))


def _parser() -> Parser:
    usage = "--ranks P --microbatches M --model NAME --sequence-length N [options]"
    parser = Parser("plan", usage, ABOUT, EPILOG)
    parser.add_argument("--ranks", type=number, required=True, metavar="P", help="pipeline ranks")
    parser.add_argument("--microbatches", type=number, required=True, metavar="M", help="micro-batches of a step")
    parser.add_argument("--memory", type=decimal, metavar="GIB", help="of each accelerator [92%% of the hardware's]")
    parser.add_argument("--families", metavar="F,F,...", help="only these [all]")
    parser.add_argument("--top", type=number, default=12, metavar="N", help="rows to show [12]")
    parser.add_argument("--config", metavar="FILE", help="write the best one as a config that helixpipe train runs")
    parser.add_argument("--svg", metavar="FILE", help="write time against memory as a picture")
    parser.add_argument("--processes", type=number, default=0, metavar="N", help="that search [one a core, at most 8]")
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    add_setting_flags(parser)
    add_data_flags(parser, STEPS)
    return parser


def _progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == of else ""
        print(f"\r{done} of {of} schedules priced", end=end, file=sys.stderr, flush=True)


def _table(
    found: Plan, setting: Setting, args: argparse.Namespace, taken_s: float, data: Sequence[str] = ()
) -> list[str]:
    """The fastest that fit, the front, and what is no pipeline."""
    memory = "any memory" if math.isinf(found.memory_bytes) else f"{gibibytes(found.memory_bytes)} each"
    group = f" of {setting.group} accelerators" if setting.group > 1 else ""
    group += f", {setting.data_parallel} times" if setting.data_parallel > 1 else ""
    lines = [
        f"{args.model}, {args.microbatches} micro-batches of {args.microbatch_size} x {args.sequence_length:,} tokens on "
        f"{args.ranks} ranks{group}; {setting.machine}, {memory}, link {setting.link.name}",
        f"{len(found.fits)} of {len(found.fits) + len(found.misses)} fit; priced in {taken_s:.0f} s",
        *_refused(found),
        *data,
        *([ONLY_RATIOS] if setting.only_ratios else []),
        "",
    ]
    front = set(map(id, found.front))
    pipelines = [choice for choice in found.fits if choice.is_pipeline]
    if not pipelines:
        return [*lines, found.nothing, *_not_pipelines(found)]
    lines.append(f"{'':>4} {'step':>9}  {'of ideal':>8}  {'bubble':>6}  {'fullest rank':>12}  schedule")
    for place, choice in enumerate(pipelines, start=1):
        if place > args.top and id(choice) not in front:
            continue
        mark = "*" if id(choice) in front else " "
        lines.append(
            f"{place:>3}{mark} {duration(choice.makespan_s):>9}  {choice.makespan_s / choice.ideal_s:>8.3f}  "
            f"{choice.bubble_ratio:>6.1%}  {gibibytes(choice.peak_bytes):>12}  {choice}"
        )
    return [*lines, "", "* no pipeline that fits is better in both time and memory", *_not_pipelines(found)]


def _data_told(found: Plan, data: DataConfig, seed: int, steps: int) -> list[str]:
    """What the numbers are of, where steps differ."""
    lines = [f"{data.path}: {packing_told(data, seed)}"]
    if not data.masks_documents:
        return [*lines, ACROSS]
    more = f"; {found.unpriced} more fit a step of micro-batches of mean work, and are slower there" * bool(
        found.unpriced
    )
    return [*lines, f"step and bubble are means of steps 1 to {steps}, bytes the most of them{more}"]


def _data_as_json(data: DataConfig, seed: int, steps: int) -> dict[str, Any]:
    return {"path": str(data.path), "packing": data.packing, "longest": data.longest, "seed": seed, "steps": steps}


def _refused(found: Plan) -> list[str]:
    """How many candidates cannot be, and why most of them."""
    if not found.refused:
        return []
    [(reason, count)] = Counter(found.refused.values()).most_common(1)
    return [f"refused: {len(found.refused)}; the commonest reason, {count} times: {reason}"]


def _not_pipelines(found: Plan) -> list[str]:
    """The best of each alternative, beside the best pipeline."""
    lines = []
    best = next((choice for choice in found.fits if choice.is_pipeline), None)
    for name in dict.fromkeys(c.candidate.family for c in (*found.fits, *found.misses) if not c.is_pipeline):
        fitting = next((c for c in found.fits if c.candidate.family == name), None)
        if fitting is None:
            lines.append(f"not a pipeline: {name} does not fit")
            continue
        told = f"{duration(fitting.makespan_s)}, {gibibytes(fitting.peak_bytes)}, {fitting.candidate.kept}"
        lines.append(f"not a pipeline: {name} {told}: {_verdict(fitting, best)}")
    return lines


def _verdict(alternative: Choice, best: Choice | None) -> str:
    if best is None:
        return "fits where no pipeline does"
    times = best.makespan_s / alternative.makespan_s
    return f"{times:.2f} times as fast as the best pipeline" if times > 1 else f"{1 / times:.2f} times as long"


def _as_json(choice: Choice, setting: Setting) -> dict[str, Any]:
    candidate = choice.candidate
    return {
        "family": candidate.family,
        "options": dict(candidate.options),
        "is_pipeline": choice.is_pipeline,
        "evenness": candidate.evenness,
        "recompute": candidate.recompute,
        "mlp_chunk": candidate.chunk,
        "head_chunk": candidate.chunk,
        "makespan_s": choice.makespan_s,
        "ideal_s": choice.ideal_s,
        "bubble_ratio": choice.bubble_ratio,
        "only_ratios": setting.only_ratios,
        "ranks": [{"rank": rank, **figures._asdict()} for rank, figures in enumerate(choice.ranks)],
    }


def _config(choice: Choice, args: argparse.Namespace, dtype: str, read: Read | None = None) -> Config:
    """The choice as a config. What the machine decides, the device and its number, is left to where it runs."""
    candidate = choice.candidate
    options = dict(candidate.options)
    tables: dict[str, dict[str, Any]] = {
        "model": {"name": args.model},
        "schedule": {
            "family": candidate.family, "ranks": args.ranks, "microbatches": args.microbatches, **options,
            "evenness": candidate.evenness, "segment_multiple": args.segment_multiple, "profile": args.profile or "",
        },
        "mesh": {"dp": args.data_parallel, "cp": args.context_parallel, "tp": args.tensor_parallel, "optimizer": args.optimizer},
        "train": {"sequence_length": args.sequence_length, "microbatch_size": args.microbatch_size},
        "runtime": {
            "dtype": dtype, "recompute": candidate.recompute, "mlp_chunk": candidate.chunk, "head_chunk": candidate.chunk,
        },
        "run": {"name": "planned"},
    }  # fmt: skip
    if read is not None:
        data = read.data
        tables["data"] = {"path": str(data.path), "packing": data.packing, "longest": data.longest}
        tables["train"]["seed"] = read.seed
    return build_config(tables)


def _title(args: argparse.Namespace) -> str:
    return f"{args.model} at {args.sequence_length:,} tokens, {args.microbatches} micro-batches on {args.ranks} ranks"
