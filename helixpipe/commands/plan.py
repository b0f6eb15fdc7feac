"""`helixpipe plan`"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from helixpipe.commands.documents import ACROSS, Read, add_data_flags, data_from, open_reading, packing_told
from helixpipe.commands.plan_accelerators import plan_accelerators
from helixpipe.commands.planned import Tables, config_text, tables_of
from helixpipe.commands.setting import (
    ONLY_RATIOS,
    add_setting_flags,
    as_flags,
    duration,
    gibibytes,
    holding_told,
    setting_from,
    wrapped,
)
from helixpipe.config_data import DataConfig
from helixpipe.errors import ConfigError
from helixpipe.files import json_text, write_text
from helixpipe.flags import Parser, amount, corpus, decimal, flag, number
from helixpipe.parts.work import Lengths
from helixpipe.predict.estimate import Setting
from helixpipe.predict.holding import holding
from helixpipe.predict.layouts import Layout
from helixpipe.predict.plan import Choice, Plan, estimate_candidate
from helixpipe.predict.plan import plan as search
from helixpipe.view.front import picture

ABOUT = """\
The best plans for a model, a sequence length, a cluster and its memory. With --accelerators the mesh is searched too, and
--ranks, --dp, --cp, --tp, --context-method, --microbatch-size and --optimizer stay what they are given as; without it they are
one mesh, and every family is priced with its options."""
EPILOG = """\
Each schedule is lowered to the program that training would run, and simulated: step time, and every rank's bytes of weights,
gradients, optimizer, activations and messages. fsdp and context_parallel are priced on the same accelerators beside them.
What a CUDA context, libraries' buffers, passing gradients and fragmentation take is not in these bytes: without --memory,
8% of the hardware's is kept free for them.
With --data all schedules are priced as if every micro-batch were the one of mean work; the fastest that fit, and those that
nothing beats in both time and memory, then on the first --steps steps of a run over the documents that training would read.
With --accelerators the rows are the best meshes, each with its best schedule. What is not simulated has a bound, its rank's own
work and the way to it, or what it keeps at least, that says it is no faster or does not fit.
"""
STEPS = 4
RESERVE = 0.08


def plan(given: list[str]) -> int:
    """`helixpipe plan ...`"""
    args = _parser().read(given)
    _check_form(args)
    if args.accelerators is not None:
        return plan_accelerators(args)
    with as_flags(family="--families"):
        setting = setting_from(args)
        memory_bytes = setting.accelerator.memory_bytes * (1 - RESERVE) if args.memory is None else args.memory * 2**30
        if not memory_bytes > 0:
            raise ConfigError(f"memory: {args.memory:g} GiB; give more than 0")
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
        print("\n".join(_held_back(found, setting, args)), end="")
    # an answer that is no pipeline is told above; it has no config
    if args.svg is not None:
        write_text(args.svg, picture(found, _title(args)))
    if args.config is not None:
        with as_flags():
            write_text(args.config, config_text(_tables(found.best, args, setting, read), _about(found.best, args)))
    return 0


# of the two forms: flags that the other one has no use for -> what to do
_OF_ACCELERATORS = {
    "batch": "--microbatches says it here", "batch_tokens": "--microbatches says it here", "tokens": "it is told of accelerators",
    "slurm": "it starts as many accelerators as are planned for",
}  # fmt: skip
_OF_RANKS = {
    "microbatches": "they follow from --batch and the mesh", "data": "documents are priced on one mesh",
    "svg": "it is drawn of one mesh", "profile": "it is measured on one device alone",
}  # fmt: skip
_DEFAULTS = {
    "data_parallel": 1, "context_parallel": 1, "tensor_parallel": 1, "context_method": "ring", "microbatch_size": 1,
    "optimizer": "replicated",
}  # fmt: skip


def _check_form(args: argparse.Namespace) -> None:
    """Raise ConfigError for flags of both forms; sets what one mesh has where nothing is given."""
    others = _OF_ACCELERATORS if args.accelerators is None else _OF_RANKS
    which = "give --accelerators with it" if args.accelerators is None else "leave it out, or --accelerators"
    for name, why in others.items():
        if getattr(args, name) is not None:
            raise ConfigError(f"{flag(name)}: {why}; {which}")
    if args.accelerators is None:
        missing = [flag(name) for name in ("ranks", "microbatches") if getattr(args, name) is None]
        if missing:
            raise ConfigError(
                f"missing: {', '.join(missing)}; or give --accelerators N and --batch, and the mesh is searched too; "
                "see --help"
            )
        for name, value in _DEFAULTS.items():
            setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    elif args.slurm is not None and args.config is None:
        raise ConfigError("--slurm: the script starts a config; give --config FILE too")
    if args.top is None:
        args.top = 12 if args.accelerators is None else 5
    if args.top < 1:
        raise ConfigError(f"--top: {args.top}; give at least 1")
    if args.processes < 0:
        raise ConfigError(f"--processes: {args.processes}; give at least 1, or 0 for one a core")


def _steps(setting: Setting, ranks: int, microbatches: int, read: Read) -> tuple[Lengths, ...]:
    """The documents of the steps that schedules are ranked by."""
    if ranks < 1 or microbatches < 1:
        return ()  # the search refuses it
    reading = open_reading(read.data, setting, microbatches, read.seed)
    return tuple(reading.documents(number) for number in range(1, read.steps + 1))


def _parser() -> Parser:
    usage = "--model NAME --sequence-length N (--accelerators N --batch B | --ranks P --microbatches M) [options]"
    parser = Parser("plan", usage, ABOUT, EPILOG)
    parser.add_argument("--accelerators", type=number, metavar="N", help="how many there are: the mesh is searched")
    parser.add_argument("--batch", type=amount, metavar="B", help="sequences of a step, on all of them")
    parser.add_argument("--batch-tokens", type=amount, metavar="T", help="or its tokens: 4M is 4 x 1,024 x 1,024")
    parser.add_argument(
        "--tokens", type=corpus, metavar="T", help="of the whole training, 100B or 500M (million): what it takes"
    )
    parser.add_argument("--ranks", type=number, metavar="P", help="pipeline ranks")
    parser.add_argument("--microbatches", type=number, metavar="M", help="micro-batches of a step on one mesh")
    parser.add_argument("--memory", type=decimal, metavar="GIB", help="of each accelerator [92%% of the hardware's]")
    parser.add_argument("--families", metavar="F,F,...", help="only these [all]")
    parser.add_argument("--top", type=number, metavar="N", help="rows to show [12, of meshes 5]")
    config = "write the best one as a config that helixpipe train runs once it is told data, steps and learning rate"
    parser.add_argument("--config", metavar="FILE", help=config)
    parser.add_argument("--slurm", metavar="FILE", help="and a batch script that starts it")
    parser.add_argument("--svg", metavar="FILE", help="write time against memory as a picture")
    parser.add_argument("--processes", type=number, default=0, metavar="N", help="that search [one a core, at most 8]")
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    add_setting_flags(parser)
    add_data_flags(parser, STEPS)
    parser.set_defaults(**dict.fromkeys(_DEFAULTS))
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
        return wrapped([*lines, found.nothing, *_not_pipelines(found)])
    lines = wrapped(lines)
    lines.append(f"{'':>4} {'step':>9}  {'of ideal':>8}  {'bubble':>6}  {'fullest':>9}  schedule")
    for place, choice in enumerate(pipelines[: args.top], start=1):
        mark = "*" if id(choice) in front else " "
        first = (
            f"{place:>3}{mark} {duration(choice.makespan_s):>9}  {choice.makespan_s / choice.ideal_s:>8.3f}  "
            f"{choice.bubble_ratio:>6.1%}  {gibibytes(choice.peak_bytes):>9}  "
        )
        lines += wrapped([str(choice)], first)
    return [*lines, *wrapped(["", "* no pipeline that fits is better in both time and memory", *_not_pipelines(found)])]


def _held_back(found: Plan, setting: Setting, args: argparse.Namespace) -> list[str]:
    """What holds the best pipeline back, if anything; of sequences of one document."""
    if not any(choice.is_pipeline for choice in found.fits):
        return []
    held = holding(estimate_candidate(setting, args.ranks, args.microbatches, found.best.candidate))
    return wrapped([f"the first is held back by {holding_told(held)}", ""]) if held else []


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


def _tables(choice: Choice, args: argparse.Namespace, setting: Setting, read: Read | None = None) -> Tables:
    """The choice as a config's tables. What the machine decides, the device and its number, is left to where it runs."""
    candidate = choice.candidate
    layout = Layout(replace(setting.mesh, pp=args.ranks), args.optimizer, args.microbatches, args.microbatch_size)
    tables = tables_of(layout, candidate, setting, args)
    if args.profile:
        tables["schedule"]["profile"] = args.profile
    if read is not None:
        data = read.data
        tables["data"] = {"path": str(data.path), "packing": data.packing, "longest": data.longest}
        tables["train"]["seed"] = read.seed
    return tables


def _about(choice: Choice, args: argparse.Namespace) -> list[str]:
    told = f"{duration(choice.makespan_s)} a step, {gibibytes(choice.peak_bytes)} on the fullest accelerator"
    return [f"helixpipe plan: {_title(args)}", f"predicted: {told}"]


def _title(args: argparse.Namespace) -> str:
    return f"{args.model} at {args.sequence_length:,} tokens, {args.microbatches} micro-batches on {args.ranks} ranks"
