"""`helixpipe plan --accelerators N`: the mesh too is searched."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import replace
from typing import Any

from helixpipe.commands.planned import config_text, launch_line, slurm_script, tables_of
from helixpipe.commands.setting import (
    ONLY_RATIOS,
    as_flags,
    duration,
    gibibytes,
    holding_told,
    nodes_from,
    setting_from,
    wrapped,
)
from helixpipe.errors import ConfigError
from helixpipe.files import json_text, write_text
from helixpipe.predict.alternatives import Alternative, alternatives
from helixpipe.predict.candidates import RECOMPUTE, chunk_sizes, slices
from helixpipe.predict.estimate import Estimate
from helixpipe.predict.layouts import Asked
from helixpipe.predict.refine import Row, estimate_row
from helixpipe.predict.search import Answer, search
from helixpipe.predict.worth import Worth, worth

RESERVE = 0.08
PER_NODE = 8
GIVEN = {"ranks": "pp", "data_parallel": "dp", "context_parallel": "cp", "tensor_parallel": "tp"}


def plan_accelerators(args: argparse.Namespace) -> int:
    """The best meshes, each with its best schedule."""
    with as_flags(family="--families"):
        asked = asked_from(args)
        processes = args.processes or min(8, os.cpu_count() or 1)
        begun = time.monotonic()
        answer = search(asked, args.top, processes, _Progress() if sys.stderr.isatty() else _quiet)
        taken_s = time.monotonic() - begun
        if not answer.rows:
            raise ConfigError(nothing_told(answer, asked))
    best = estimate_row(asked, answer.rows[0])
    from helixpipe.train.model_flops import ModelFlops  # NumPy, which predictions need for nothing else

    found = worth(best, ModelFlops(best.setting.shape).of_document(best.setting.sequence_length))
    if args.json:
        print(json_text(_as_json(answer, asked, found, taken_s)))
    else:
        print("\n".join(told(answer, asked, best, found, args, taken_s)))
    _leave_behind(answer.rows[0], asked, args)
    return 0


def asked_from(args: argparse.Namespace) -> Asked:
    """What the flags ask for; raises ConfigError."""
    given = {ours: getattr(args, name) for name, ours in GIVEN.items()}
    for name, value in given.items():
        if value is not None and value < 1:
            raise ConfigError(f"{'ranks' if name == 'pp' else name}: {value}; give at least 1")
    method, size, optimizer = args.context_method, args.microbatch_size, args.optimizer
    if args.per_node is None:
        args.per_node = min(PER_NODE, args.accelerators)
    per_node = args.per_node
    if args.accelerators < 1:
        raise ConfigError(f"accelerators: {args.accelerators}; give at least 1")
    if per_node < 1:
        raise ConfigError(f"per_node: {per_node}; give at least 1")
    if args.accelerators > per_node and args.accelerators % per_node:
        raise ConfigError(
            f"accelerators: {args.accelerators} do not fill nodes of {per_node}; give a multiple, or another --per-node"
        )
    plain = {
        "data_parallel": 1, "context_parallel": 1, "tensor_parallel": 1, "context_method": "ring",
        "microbatch_size": size or 1, "optimizer": optimizer or "replicated", "per_node": None,
    }  # fmt: skip
    setting = setting_from(argparse.Namespace(**vars(args) | plain))
    if method is not None:
        setting_from(argparse.Namespace(**vars(args) | plain | {"context_method": method}))  # refuses what is none
    memory_bytes = setting.accelerator.memory_bytes * (1 - RESERVE) if args.memory is None else args.memory * 2**30
    if not memory_bytes > 0:
        raise ConfigError(f"memory: {args.memory:g} GiB; give more than 0")
    return Asked(
        setting, args.accelerators, sequences_from(args), memory_bytes, nodes_from(args, setting), **given,
        context_method=method, optimizer=optimizer, microbatch_size=size,
        families=tuple(args.families.split(",")) if args.families else (),
    )  # fmt: skip


def sequences_from(args: argparse.Namespace) -> int:
    """Of a step: --batch, or as many as come nearest to --batch-tokens."""
    if (args.batch is None) == (args.batch_tokens is None):
        given = "both are given" if args.batch is not None else "how much is a step"
        raise ConfigError(f"--batch, --batch-tokens: {given}; give one of them, in sequences or in tokens")
    sequences = args.batch
    if sequences is None:
        sequences = round(args.batch_tokens / args.sequence_length)
    if sequences < 1:
        what = (
            f"--batch-tokens: {args.batch_tokens:,} tokens are less than half a sequence"
            if args.batch_tokens
            else f"--batch: {sequences}"
        )
        raise ConfigError(f"{what}; give at least one sequence")
    return int(sequences)


class _Progress:
    """How far the search is, on one line that ends in nothing."""

    def __init__(self) -> None:
        self._told = 0.0

    def __call__(self, done: int, left: int) -> None:
        if left and time.monotonic() - self._told < 0.2:
            return
        self._told = time.monotonic()
        end = "" if left else "\n"
        print(f"\r{done} simulated, {left} could still be better \033[K", end=end, file=sys.stderr, flush=True)


def _quiet(done: int, left: int) -> None:
    pass


def nothing_told(answer: Answer, asked: Asked) -> str:
    if not answer.least:
        return f"no schedule can be made for this: {answer.refused}"
    return (
        f"memory: no plan fits {gibibytes(asked.memory_bytes)}; the nearest is {answer.least}, which needs at least "
        f"{gibibytes(answer.least_bytes)}: give more accelerators, or that much memory"
    )


def told(
    answer: Answer, asked: Asked, best: Estimate, found: Worth, args: argparse.Namespace, taken_s: float
) -> list[str]:
    """The answer as lines that fit the terminal."""
    lines = wrapped(_head(answer, asked, args, taken_s))
    lines += ["", f"{'':>3} {'step':>9} {'tokens/s':>9} {'of peak':>7} {'fullest':>9}  mesh; schedule"]
    accelerators = asked.accelerators
    peak = accelerators * asked.setting.accelerator.rate(asked.setting.keeping.element_bytes)
    done = found.model_flops_utilisation * best.step_s * peak
    for place, row in enumerate(answer.rows, start=1):
        used = f"{done / (row.step_s * peak):.1%}" if done else "-"
        each = asked.tokens / row.step_s / accelerators
        first = f"{place:>3} {duration(row.step_s):>9} {each:>9,.0f} {used:>7} {gibibytes(row.peak_bytes):>9}  "
        lines += wrapped([f"{', '.join([str(row.layout), *row.layout.told])}; {row.schedule_told}"], first)
    return lines + wrapped(["", *best_told(answer.rows[0], asked, best, found, args.tokens), *_apart(asked, best)])


def _head(answer: Answer, asked: Asked, args: argparse.Namespace, taken_s: float) -> list[str]:
    setting, nodes = asked.setting, asked.nodes
    across = f" and {nodes.across.name} between nodes" if asked.accelerators > nodes.per_node else ""
    memory = "any memory" if math.isinf(asked.memory_bytes) else f"{gibibytes(asked.memory_bytes)} each"
    sequences = "1 sequence" if asked.sequences == 1 else f"{asked.sequences:,} sequences"
    lines = [
        f"{args.model}, {_parameters(setting.shape.parameter_count)} parameters; a step of {sequences} of "
        f"{setting.sequence_length:,} tokens" + (f", {asked.tokens:,} in all" if asked.sequences > 1 else ""),
        f"{asked.accelerators} x {setting.machine}, {memory}; {nodes.inside.name} among {min(nodes.per_node, asked.accelerators)} of a node{across}",
    ]
    if setting.profile is None and not setting.only_ratios:
        lines.append(f"attention: {setting.accelerator.attention}")
        lines += [f"not called by training: {kernel}" for kernel in setting.accelerator.other_attention]
    more = f" by more than {answer.within:.0%}" if answer.within else ""
    lines.append(
        f"{answer.layouts} layouts; {answer.simulated} schedules simulated in {taken_s:.0f} s, of named families no other is faster{more}"
    )
    return lines + ([ONLY_RATIOS] if setting.only_ratios else [])


def _parameters(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def best_told(row: Row, asked: Asked, best: Estimate, found: Worth, tokens: int | None) -> list[str]:
    """What the best plan comes to."""
    used = f", {found.model_flops_utilisation:.1%} of the peak in model FLOPs" if found.model_flops_utilisation else ""
    lines = [f"the best: {duration(best.step_s)} a step, {found.tokens_per_s:,.0f} tokens/s an accelerator{used}"]
    if tokens is not None:
        hours = found.accelerator_hours(tokens)
        lines.append(
            f"{tokens:,} tokens: {-(-tokens // asked.tokens):,} steps, {hours / asked.accelerators:,.1f} hours, "
            f"{hours:,.0f} accelerator-hours"
        )
    parts = ", ".join(f"{name} {gibibytes(size)}" for name, size in found.bytes._asdict().items() if size)
    where = f" (rank {found.fullest})" if row.layout.mesh.pp > 1 else ""
    lines.append(f"the fullest accelerator{where}: {gibibytes(row.peak_bytes)}: {parts}")
    lines.append(f"why not faster: {why_not_faster(best, found)}")
    return lines


def why_not_faster(best: Estimate, found: Worth) -> str:
    """Where the step goes, the most first; and what one rank has more to do than the others."""
    kernel = best.setting.accelerator.attention
    named = {"attention": f"attention ({kernel.forward:.2f} of the peak forward, {kernel.backward:.2f} backward)"}
    named = {} if best.setting.profile or best.setting.only_ratios else named
    shares = sorted(found.seconds.items(), key=lambda each: -each[1])
    text = ", ".join(f"{named.get(name, name)} {s / best.step_s:.0%}" for name, s in shares if s / best.step_s >= 0.005)
    return text if found.holding is None else f"{text}; held back by {holding_told(found.holding)}"


def _apart(asked: Asked, best: Estimate) -> list[str]:
    """What is priced beside it and is not trained here."""
    lines = []
    for name, (choice, kept) in _alternatives(asked).items():
        times = best.step_s / choice.makespan_s
        verdict = f"{times:.2f} times as fast" if times > 1 else f"{1 / times:.2f} times as long"
        lines.append(
            f"not of helixpipe train: {name}, weights sharded over all: {duration(choice.makespan_s)}, "
            f"{gibibytes(choice.peak_bytes)}, {kept}: {verdict}"
        )
    return lines


def _alternatives(asked: Asked) -> dict[str, tuple[Alternative, str]]:
    """The fastest of each that fits."""
    found: dict[str, tuple[Alternative, str]] = {}
    tp = asked.tp or 1
    if asked.accelerators % tp:
        return found
    base = replace(
        asked.setting,
        tensor_parallel=tp,
        link=asked.nodes.across if asked.accelerators > asked.nodes.per_node else asked.nodes.inside,
    )
    for recompute in RECOMPUTE:
        for chunk in chunk_sizes(base.sequence_length) if slices(base.shape) else (0,):
            keeping = replace(base.keeping, recompute=recompute, mlp_chunk=chunk, head_chunk=chunk)
            for each in alternatives(replace(base, keeping=keeping), asked.accelerators // tp, asked.sequences):
                best = found.get(each.name)
                if each.peak_bytes <= asked.memory_bytes and (best is None or each.makespan_s < best[0].makespan_s):
                    found[each.name] = each, f"recompute {recompute}" + (f", chunks of {chunk}" if chunk else "")
    return found


def _leave_behind(row: Row, asked: Asked, args: argparse.Namespace) -> None:
    """The config and what starts it."""
    if args.config is None:
        return
    with as_flags():
        about = [
            f"helixpipe plan: {args.model} on {asked.accelerators} x {asked.setting.machine}, "
            f"{asked.sequences} sequences of {asked.setting.sequence_length:,} tokens a step",
            f"predicted: {duration(row.step_s)} a step, {gibibytes(row.peak_bytes)} on the fullest accelerator",
        ]
        write_text(
            args.config, config_text(tables_of(row.layout, row.candidate, row.layout.setting(asked), args), about)
        )
    line = launch_line(args.config, asked.accelerators, args.per_node)
    if args.slurm is not None:
        write_text(args.slurm, slurm_script(args.slurm, args.config, asked.accelerators, args.per_node))
        line = f"sbatch {args.slurm}"
    if not args.json:
        print(f"\nset in {args.config} what run.asks names, then start it on every node with\n    {line}")


def _as_json(answer: Answer, asked: Asked, found: Worth, taken_s: float) -> dict[str, Any]:
    rows = [
        {
            "mesh": {name: getattr(row.layout.mesh, name) for name in ("pp", "dp", "cp", "tp")},
            "context_method": row.layout.mesh.context_method if row.layout.mesh.cp > 1 else None,
            "optimizer": row.layout.optimizer,
            "microbatches": row.layout.microbatches,
            "microbatch_size": row.layout.microbatch_size,
            "family": row.candidate.family if row.layout.mesh.pp > 1 else None,
            "options": dict(row.candidate.options),
            "evenness": row.candidate.evenness,
            "recompute": row.candidate.recompute,
            "chunk": row.candidate.chunk,
            "step_s": row.step_s,
            "tokens_per_s_per_accelerator": asked.tokens / row.step_s / asked.accelerators,
            "peak_bytes": row.peak_bytes,
        }
        for row in answer.rows
    ]
    best = {
        "model_flops_utilisation": found.model_flops_utilisation,
        "bytes": found.bytes._asdict(),
        "seconds": found.seconds,
        "holding": found.holding and found.holding._asdict(),
    }
    kernel = asked.setting.accelerator.attention
    return {
        "rows": rows, "best": best, "layouts": answer.layouts, "simulated": answer.simulated, "within": answer.within, "taken_s": taken_s,
        "only_ratios": asked.setting.only_ratios,
        "attention": {"kernel": kernel.name, "forward": kernel.forward, "backward": kernel.backward, "source": kernel.source},
    }  # fmt: skip
