"""What do orders built from costs bring? Simulated: `python benchmarks/orders/run.py [--only PART]`

grid         60 cases of equal layers, free messages: constructed beside the best named family in the same memory
windows      a model whose layers see 4096 tokens and, every fourth, all: 8 ranks
documents    steps whose micro-batches hold documents of unlike lengths: 8 ranks
vocabulary   head and embedding on one rank each, or divided over all: every family, three models, 8 ranks
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from helixpipe.errors import ConfigError
from helixpipe.parts.shapes import named_shape
from helixpipe.parts.work import Batch, Keeping, microbatches
from helixpipe.predict.building import kept_bytes, prices
from helixpipe.predict.estimate import Estimate, Setting, estimate
from helixpipe.predict.hardware import named_accelerator, named_link
from helixpipe.predict.peak import peak_kept
from helixpipe.predict.simulate import simulate_schedule
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families import FAMILIES, build_schedule, options
from helixpipe.schedule.schedule import Schedule

V_SHAPED = ("zb_v", "v_half", "v_min", "dualpipe_v")
COSTS = ((1.0, 1.0, 1.0), (2.0, 3.0, 1.0))
"""F, I and W of a rank's layers: matrices alone, and mostly attention."""
SIZES = ((2, 4), (4, 4), (4, 8), (8, 8), (8, 16))
"""Ranks and micro-batches."""
RANKS, MICROBATCHES = 8, 16
GRID: tuple[tuple[str, dict[str, Any]], ...] = (
    ("1f1b", {}), ("interleaved", {"stages_per_rank": 2}), ("interleaved", {"stages_per_rank": 4}), ("zb_h1", {}), ("zb_v", {}),
    ("seq1f1b", {"segments": 4}), ("seq1f1b", {"segments": 8}), ("seq1f1b_zb", {"segments": 4}), ("seq1f1b_zb", {"segments": 8}),
    ("seq1f1b_interleaved", {"segments": 4, "stages_per_rank": 2}), ("seq1f1b_interleaved", {"segments": 8, "stages_per_rank": 2}),
    ("seq1f1b_interleaved", {"segments": 4, "stages_per_rank": 4}), ("seq1f1b_interleaved", {"segments": 8, "stages_per_rank": 4}),
    ("helix", {"folds": 1}), ("helix", {"folds": 2}),
)  # fmt: skip
BUILT = (
    (8, 1, "line", ""),
    (8, 1, "line", "3"),
    (8, 2, "v", ""),
    (8, 2, "v", "3"),
    (8, 4, "looped", ""),
    (8, 4, "looped", "1.5"),
)
"""Segments, stages a rank, placement and memory of constructed; "": as much as the best named one's forwards keep."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS)
    only = parser.parse_args().only
    for name, part in PARTS.items():
        if only in (None, name):
            print(f"\n## {name}\n")
            for line in part():
                print(line, flush=True)


def alike(costs: tuple[float, float, float]) -> Callable[[Schedule], Callable[[Action], float]]:
    """Every stage and segment costs as much."""

    def takes_of(schedule: Schedule) -> Callable[[Action], float]:
        pieces = len(schedule.stages) // len(schedule.ranks) * schedule.segments
        f, i, w = (each / pieces for each in costs)
        takes = {Pass.F: f, Pass.I: i, Pass.W: w, Pass.B: i + w}
        return lambda action: takes[action.kind]

    return takes_of


def grid() -> Iterator[str]:
    """Memory is counted in what one micro-batch leaves on a rank."""
    yield "| ranks | micro-batches | segments | F, I, W | memory | best named | | constructed | | shorter by |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    gains, begun = [], time.monotonic()
    for (p, m), k, costs in itertools.product(SIZES, (1, 4), COSTS):
        takes = alike(costs)
        known = [(memory(s), span(s, takes), name) for name, s in named(p, m, k)]
        for cap in caps(p, k, min(kept for kept, _, _ in known)):
            fitting = [(length, name) for kept, length, name in known if kept <= cap]
            built = []
            for placement, v in (("line", 1), ("looped", 2), ("v", 2)):
                sizes = {"ranks": p, "layers": 2 * p, "microbatches": m, "segments": k, "stages_per_rank": v}
                given = {"placement": placement, "memory": f"{cap:g}", "delay": 0.0, "prices": takes}
                schedule = build_schedule("constructed", **sizes, **given)
                assert memory(schedule) <= cap * (1 + 1e-9)
                built.append((span(schedule, takes), f"{placement}, {v} a rank"))
            (length, name), (shortest, how) = min(fitting), min(built)
            gains.append(1 - shortest / length)
            told = ", ".join(f"{each:g}" for each in costs)
            yield f"| {p} | {m} | {k} | {told} | {cap:g} | {name} | {length:.3f} | {how} | {shortest:.3f} | {gains[-1]:.1%} |"
    worse = sum(gain < -1e-9 for gain in gains)
    yield f"\n{len(gains)} cases, {worse} longer, {sum(g > 1e-3 for g in gains)} shorter, by {statistics.mean(gains):.1%} on average"
    yield f"and {max(gains):.1%} at most; {time.monotonic() - begun:.0f} s"


def caps(p: int, k: int, least: float) -> tuple[float, ...]:
    """Half of 1F1B's, 1F1B's and ZB-H2's; of segments, Seq1F1B's, twice what that is beyond one, and 1F1B's."""
    return (max(least, p / 2), p, 2 * p - 1) if k == 1 else (1 + (p - 1) / k, 1 + 2 * (p - 1) / k, p)


def named(p: int, m: int, k: int) -> Iterator[tuple[str, Schedule]]:
    """Every named family with so many segments, of one and two stages a rank."""
    for family in sorted(set(FAMILIES) - {"helix", "constructed"}):
        known = options(family)
        if (k > 1 and "segments" not in known) or (family == "dualpipe_v" and m < 2 * p):
            continue
        for v in (1, 2) if "stages_per_rank" in known else (0,):
            given = {"segments": k} if "segments" in known else {}
            given |= {"stages_per_rank": v} if v else {}
            told = f"{family}, {v} a rank" if v else family
            yield told, build_schedule(family, ranks=p, layers=2 * p, microbatches=m, **given)


def memory(schedule: Schedule) -> float:
    return max(peak_kept(schedule)) / (len(schedule.stages) // len(schedule.ranks) * schedule.segments)


def span(schedule: Schedule, takes: Callable[[Schedule], Callable[[Action], float]]) -> float:
    return simulate_schedule(schedule, takes(schedule)).makespan_s


def setting(model: str, length: int, hardware: str = "h100", **changes: Any) -> Setting:
    accelerator = named_accelerator(hardware)
    keeping = Keeping("none", 2, device=accelerator.device)
    return Setting(
        replace(named_shape(model), **changes), length, accelerator, named_link(accelerator.link), keeping,
        tensor_parallel=8, tensor_link=named_link(accelerator.tensor_link),
    )  # fmt: skip


def best_of(
    where: Setting, batches: Callable[[int], tuple[Batch, ...]], vocabulary: str
) -> tuple[tuple[Estimate, str], tuple[Estimate, str]]:
    """The best named schedule, and the best constructed in no more bytes on the fullest rank than that takes.

    The second is built from the costs of this machine and these batches, as a profile of it would tell them.
    """
    found = []
    for family, given in GRID:
        try:
            schedule = where.build(family, RANKS, MICROBATCHES, vocabulary=vocabulary, **given)
        except ConfigError:
            continue
        found.append((estimate(schedule, where, batches(schedule.segments)), told(family, given)))
    best = min(found, key=lambda each: each[0].step_s)
    built = []
    as_named = kept(best[0].schedule, where, batches)
    for k, v, placement, room in BUILT:
        room = room or f"{as_named:.6f}GiB"
        given = {"segments": k, "stages_per_rank": v, "placement": placement, "memory": room, "vocabulary": vocabulary}
        known = where.known("constructed", vocabulary, batches(k))
        known["prices"] = partial(prices, where, where.costs, batches(k))
        sizes = {"ranks": RANKS, "model": where.shape, "microbatches": MICROBATCHES}
        try:
            schedule = build_schedule("constructed", **sizes, **(known | given))
        except ConfigError:
            continue
        built.append((estimate(schedule, where, batches(k)), told("constructed", given | {"vocabulary": None})))
    fitting = [each for each in built if each[0].peak_bytes <= best[0].peak_bytes]
    return best, min(fitting or built, key=lambda each: each[0].step_s)


def kept(schedule: Schedule, where: Setting, batches: Callable[[int], tuple[Batch, ...]]) -> float:
    """GiB that forwards keep on the fullest rank, those of the vocabulary's shards not counted."""
    keeps, most = kept_bytes(where, batches(schedule.segments), schedule), 0.0
    layers = {s for s, stage in enumerate(schedule.stages) if any(part.about.attends for part in stage.parts)}
    for order in schedule.ranks:
        live = 0.0
        for action in order:
            forward = action.sibling(Pass.F)
            if action.stage in layers and action.kind is not Pass.R:
                held, late = keeps.until_backward(forward), keeps.put_off(forward)
                live += {Pass.F: held, Pass.B: -held, Pass.I: late - held, Pass.W: -late}[action.kind]
                most = max(most, live)
    return most / 2**30


def told(family: str, given: dict[str, Any]) -> str:
    return ", ".join([family, *(f"{name} {value}" for name, value in given.items() if value is not None)])


def compared(name: str, best: tuple[Estimate, str], built: tuple[Estimate, str]) -> str:
    cells = [name]
    for each, how in (best, built):
        cells += [
            how,
            f"{each.step_s:.3f} s",
            f"{each.step_s / each.ideal_s:.3f}",
            f"{each.peak_bytes / 2**30:.1f} GiB",
        ]
    return f"| {' | '.join(cells)} | {1 - built[0].step_s / best[0].step_s:.1%} |"


HEAD = (
    "| | best named | step | of ideal | fullest rank | constructed | step | of ideal | fullest rank | shorter by |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def windows() -> Iterator[str]:
    yield from HEAD
    for length, full in ((131072, 4), (131072, 6)):
        pattern = tuple(layer % full != full - 1 for layer in range(full))
        where = setting("llama3-8b", length, window=4096, window_pattern=pattern)
        best, built = best_of(where, lambda k, where=where: (where.batch(k),) * MICROBATCHES, "spread")
        yield compared(f"{length:,} tokens, 1 layer of {full} sees all", best, built)


def documents() -> Iterator[str]:
    yield from HEAD
    for seed, median in ((0, 8192), (1, 32768)):
        where = setting("llama3-8b", 131072)
        draw = random.Random(seed)
        rows = tuple(row(draw, median, where.sequence_length) for _ in range(MICROBATCHES))

        def batches(k: int, where: Setting = where, rows: tuple[tuple[int, ...], ...] = rows) -> tuple[Batch, ...]:
            return tuple(
                microbatches(where.batch(k), MICROBATCHES, rows, lambda mine: where.batch(k, mine).segment_lengths)
            )

        best, built = best_of(where, batches, "spread")
        yield compared(f"documents of {median:,} tokens in the middle, step {seed}", best, built)


def row(draw: random.Random, median: int, length: int) -> tuple[int, ...]:
    """Documents of log-normal lengths until a sequence is full; the last one is cut."""
    found: list[int] = []
    while sum(found) < length:
        found.append(min(max(64, round(median * draw.lognormvariate(0, 1.2))), length - sum(found)))
    return tuple(found)


def vocabulary() -> Iterator[str]:
    yield "| model | family | last | fullest rank | spread | fullest rank |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for model, length, hardware in (("llama3-8b", 131072, "h100"), ("llama3-8b", 32768, "h100"), ("7b", 131072, "h20")):
        where = setting(model, length, hardware)
        for family, given in GRID:
            cells = []
            for kind in ("last", "spread"):
                schedule = where.build(family, RANKS, MICROBATCHES, vocabulary=kind, **given)
                priced = estimate(schedule, where)
                cells += [f"{priced.step_s / priced.ideal_s:.3f}", f"{priced.peak_bytes / 2**30:.1f} GiB"]
            yield f"| {model} at {length:,}, {hardware} | {told(family, given)} | {' | '.join(cells)} |"


PARTS: dict[str, Callable[[], Iterator[str]]] = {
    "grid": grid, "windows": windows, "documents": documents, "vocabulary": vocabulary,
}  # fmt: skip

if __name__ == "__main__":
    main()
