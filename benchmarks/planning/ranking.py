"""Do plans rank as they run? `python benchmarks/planning/ranking.py --record FILE`

24 plans for 2 and 4 local ranks, laid out over pp, dp, cp and tp, take training steps on two cores, one thread a rank; and each
is predicted, by what `helixpipe plan` prices a row with, from a profile measured in the same rounds.

    parts      timed as two ranks at once run them, and of each tp x cp by a group that shares them: exchanges are in their times
    messages   a ping-pong; sums of gradients, over as many ranks as measured at once
    cores      rank r has core r mod 2; of four ranks those of one core have equal shares of it, in the prediction too
    a step     gradients made and clipped to a norm, and the update: from a barrier to a barrier, the median of all rounds
    bytes      on the heap of all threads of a rank (`heap.py`), beyond what was there before the plan's pipeline was made

A run adds its rounds to the record, so that many short ones make a long one; `--ranks 4` adds to those plans alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import heap
import torch
import torch.distributed as dist
from peers import launch, machine, timed

from helixpipe.config import TrainConfig
from helixpipe.files import write_text
from helixpipe.mesh import MeshShape
from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Keeping
from helixpipe.predict.candidates import Candidate, setting_of
from helixpipe.predict.estimate import Estimate, Setting, priced
from helixpipe.predict.hardware import Link, named_accelerator
from helixpipe.predict.layouts import Layout
from helixpipe.predict.profile import Profile, Timing
from helixpipe.runtime.mesh import make_device_mesh
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.runtime.profiling import Parts, default_cuts, measure_link, measure_sums
from helixpipe.schedule.action import Pass
from helixpipe.schedule.lower import lower
from helixpipe.schedule.schedule import Schedule
from helixpipe.train.optimizer import Optimizer

CORES = 2
TIMEOUT_S = 300.0
KIND = ("ranks", "tp", "cp", "context_method")
SPREAD = ("vocabulary", "spread")


@dataclass(frozen=True)
class Model:
    """What all plans train."""

    shape: ModelShape = field(
        default_factory=lambda: ModelShape(layers=8, hidden=256, heads=8, kv_heads=4, ffn=1024, vocabulary=4096)
    )
    length: int = 512
    sequences: int = 4


@dataclass(frozen=True)
class Planned:
    """A row of a plan."""

    mesh: MeshShape
    candidate: Candidate
    optimizer: str = "replicated"

    @property
    def name(self) -> str:
        layout = self.layout(1)
        schedule = str(self.candidate) if self.mesh.pp > 1 else self.candidate.kept
        return ", ".join([str(layout), *layout.told, schedule])

    def layout(self, sequences: int) -> Layout:
        return Layout(self.mesh, self.optimizer, sequences // self.mesh.dp, 1)

    @property
    def kind(self) -> Kind:
        """Of the profile that prices it."""
        mesh = self.mesh
        return Kind(mesh.size, mesh.tp, mesh.cp, mesh.context_method if mesh.cp > 1 else "ring")

    def setting(self, model: Model, **measured: Any) -> Setting:
        mesh, keeping = self.mesh, Keeping("none", 4)
        bare = Setting(
            model.shape, model.length, named_accelerator("laptop-core"), keeping=keeping, tensor_parallel=mesh.tp,
            context_parallel=mesh.cp, data_parallel=mesh.dp, context_method=mesh.context_method, optimizer=self.optimizer, segment_multiple=32,
        )  # fmt: skip
        return setting_of(replace(bare, **measured), self.candidate)

    def schedule(self, model: Model) -> Schedule:
        """As training builds it that has no profile: balanced by FLOPs."""
        count, options = self.layout(model.sequences).microbatches, dict(self.candidate.options)
        return self.setting(model).build(self.candidate.family, self.mesh.pp, count, **options)

    def lengths(self, model: Model) -> tuple[int, ...]:
        """Of its segments."""
        return self.setting(model).batch(dict(self.candidate.options).get("segments", 1)).segment_lengths


@dataclass(frozen=True, order=True)
class Kind:
    """Of a profile: how many ranks measured at once, and which of them shared parts."""

    ranks: int
    tp: int = 1
    cp: int = 1
    context_method: str = "ring"

    @property
    def mesh(self) -> MeshShape:
        return MeshShape(1, self.ranks // (self.tp * self.cp), self.cp, self.tp, self.context_method)

    def __str__(self) -> str:
        return f"{self.ranks} ranks, tp {self.tp}, cp {self.cp} {self.context_method}"


def _plan(
    mesh: dict[str, Any], family: str = "1f1b", recompute: str = "none", optimizer: str = "replicated", **options: Any
) -> Planned:
    given = tuple(options.items())
    return Planned(MeshShape(**mesh), Candidate(family, given, recompute=recompute), optimizer)


PP, DP, CP, TP = ({name: 2} for name in ("pp", "dp", "cp", "tp"))
ULYSSES = {"context_method": "ulysses"}
LOOPED = {"stages_per_rank": 2}
PLANS = (
    _plan(PP, "1f1b"),
    _plan(PP, "1f1b", "full", vocabulary="spread"),
    _plan(PP, "interleaved", **LOOPED),
    _plan(PP, "zb_v", "selective"),
    _plan(PP, "seq1f1b", segments=4),
    _plan(PP, "seq1f1b_interleaved", "selective", segments=2, **LOOPED, vocabulary="spread"),
    _plan(PP, "helix", "selective", travel="qkv"),
    _plan(DP),
    _plan(DP, recompute="full", optimizer="sharded"),
    _plan(CP, recompute="selective"),
    _plan(CP | ULYSSES, recompute="full"),
    _plan(TP),
    _plan({"pp": 4}, "1f1b"),
    _plan({"pp": 4}, "seq1f1b", "selective", segments=4, vocabulary="spread"),
    _plan({"pp": 4}, "zb_h1", "full"),
    _plan(PP | DP, "1f1b", optimizer="sharded"),
    _plan(PP | CP, "seq1f1b_interleaved", segments=2, **LOOPED),
    _plan(PP | TP, "interleaved", "selective", **LOOPED),
    _plan({"dp": 4}, optimizer="sharded"),
    _plan(DP | CP | ULYSSES, recompute="selective"),
    _plan(DP | TP, recompute="full", optimizer="sharded"),
    _plan({"cp": 4}),
    _plan(CP | TP, recompute="selective"),
    _plan({"tp": 4}, recompute="full"),
)


@dataclass
class Record:
    """What was measured so far."""

    machine: str = ""
    timings: dict[Kind, list[Timing]] = field(default_factory=dict)
    links: dict[Kind, list[tuple[Link, Link]]] = field(default_factory=dict)
    """Of messages, and of sums of gradients."""
    steps: dict[str, list[float]] = field(default_factory=dict)
    """By the plan's name, seconds."""
    updates: dict[str, list[float]] = field(default_factory=dict)
    """Of these the update's, on rank 0."""
    heap_bytes: dict[str, list[int]] = field(default_factory=dict)
    """Of the fullest rank."""

    @staticmethod
    def load(path: Path) -> Record:
        if not path.exists():
            return Record()
        found = json.loads(path.read_text())
        timings = {
            Kind(*k): [Timing(kind, Pass(run), *more) for kind, run, *more in rows] for k, rows in found["timings"]
        }
        links = {Kind(*k): [(Link(**a), Link(**b)) for a, b in rows] for k, rows in found["links"]}
        return Record(found["machine"], timings, links, found["steps"], found["updates"], found["heap_bytes"])

    def save(self, path: Path) -> None:
        def listed(kind: Kind) -> list[Any]:
            return [getattr(kind, name) for name in KIND]

        found = vars(self) | {
            "timings": [(listed(kind), rows) for kind, rows in self.timings.items()],
            "links": [
                (listed(kind), [[vars(link) for link in row] for row in rows]) for kind, rows in self.links.items()
            ],
        }
        write_text(path, json.dumps(found))

    def profile(self, kind: Kind, model: Model) -> Profile:
        """Medians of all rounds of all runs; of ranks that share cores means, since a median has not the turns of others."""
        seconds: dict[Any, list[float]] = {}
        for timing in self.timings[kind]:
            seconds.setdefault(timing[:4], []).append(timing.seconds)
        middle = statistics.median if kind.ranks <= CORES else statistics.mean
        timings = tuple(Timing(*which, middle(each)) for which, each in seconds.items())
        link = _middle([link for link, _ in self.links[Kind(min(kind.ranks, CORES))]])  # of ranks with a core each
        sums = _middle([sums for _, sums in self.links[kind]])
        return Profile(
            model.shape, self.machine, "float32", 1, kind.ranks, torch.__version__.split("+")[0], timings, link, "cpu", sums,
            kind.tp, kind.cp, kind.context_method,
        )  # fmt: skip


def _middle(links: Sequence[Link]) -> Link:
    """Of several measurements of one link that which is neither the quickest nor the slowest."""
    return sorted(links, key=lambda link: link.seconds(2**20))[len(links) // 2]


class Contender:
    """A plan's pipeline on this rank, and its optimizer."""

    def __init__(self, plan: Planned, model: Model) -> None:
        schedule = plan.schedule(model)
        self.plan = plan
        mesh = make_device_mesh(plan.mesh, "cpu", TIMEOUT_S)
        self.pipeline = Pipeline(
            Decoder(model.shape), schedule, mesh, recompute=plan.candidate.recompute, timeout_s=TIMEOUT_S,
            segment_lengths=plan.lengths(model) if schedule.segments > 1 else None, context_method=plan.mesh.context_method,
        )  # fmt: skip
        shards = self.pipeline.shards() if plan.optimizer == "sharded" else None
        self.optimizer = Optimizer(self.pipeline.parameters, TrainConfig(), shards=shards)
        draw = torch.Generator().manual_seed(0)
        size = model.sequences, model.length
        self.update_s = 0.0
        """Of the last step's update."""
        self.batch = [torch.randint(model.shape.vocabulary, size, generator=draw) for _ in range(2)]

    def step(self) -> None:
        """One of training's."""
        self.pipeline.zero_gradients()
        self.pipeline.step(*self.batch, clip_norm=1.0)
        begun = time.perf_counter()
        self.optimizer.step(0)
        self.update_s = time.perf_counter() - begun


def measure(rank: int, ranks: int, model: Model, rounds: int, path: Path) -> None:
    """All plans of so many ranks, and the profiles that price them, in turns; rank 0 writes the record."""
    plans = [plan for plan in PLANS if plan.mesh.size == ranks]
    kinds = sorted({plan.kind for plan in plans if plan.kind.ranks == ranks})
    profilers = {kind: Parts(model.shape, "cpu", torch.float32, kind.mesh) for kind in kinds}
    cuts = default_cuts(model.shape, model.length)
    contenders, heaps = [], []
    first = Contender(plans[0], model)
    first.step()  # what a process makes once is nobody's
    first.pipeline.close()
    del first
    for plan in plans:
        gc.collect()
        before = heap.now_bytes()
        contender = Contender(plan, model)
        contender.step()
        contender.pipeline.zero_gradients()
        gc.collect()
        stands = heap.now_bytes() - before
        heaps.append(stands + heap.over_before(contender.step))
        contenders.append(contender)
        _say(rank, f"{plan.name}: {heaps[-1] / 2**20:.1f} MiB on rank 0")
    steps, updates = ([[] for _ in plans], [[] for _ in plans])
    timings: dict[Kind, list[Timing]] = {kind: [] for kind in kinds}
    for turn in range(-1, rounds):  # the first is a warm-up: memory that a process takes for the first time costs
        for kind, parts in profilers.items():
            for cut in cuts:
                dist.barrier()
                found = list(parts.run(cut))
                timings[kind] += found if turn >= 0 else []
        order = [(turn + place) % len(plans) for place in range(len(plans))]
        for place in order:
            took = timed(contenders[place].step)
            if turn >= 0:
                steps[place].append(took)
                updates[place].append(contenders[place].update_s)
        _say(rank, f"round {turn + 1} of {rounds}")
    links = measure_link("cpu"), measure_sums("cpu")
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, (heaps, timings))
    if rank == 0:
        record = Record.load(path)
        record.machine = machine()
        for kind in kinds:
            record.timings.setdefault(kind, []).extend(each for _, found in everyone for each in found[kind])
            record.links.setdefault(kind, []).append(links)
        for place, plan in enumerate(plans):
            record.steps.setdefault(plan.name, []).extend(steps[place])
            record.updates.setdefault(plan.name, []).extend(updates[place])
            record.heap_bytes.setdefault(plan.name, []).append(max(found[place] for found, _ in everyone))
        record.save(path)
    for contender in contenders:
        contender.pipeline.close()


def _say(rank: int, line: str) -> None:
    if rank == 0:
        print(line, file=sys.stderr, flush=True)


def predicted(plan: Planned, model: Model, profile: Profile) -> Estimate:
    """As a plan prices a row, of the very schedule that runs."""
    assert profile.link is not None
    measured = {"profile": profile, "link": profile.link, "sums": profile.sums, "cores": CORES}
    schedule, setting = plan.schedule(model), plan.setting(model, **measured)
    return priced(lower(schedule, model.shape, Batch(1, plan.lengths(model))), setting)


def rows(record: Record, model: Model) -> Iterator[dict[str, Any]]:
    """Of each plan that was measured."""
    for plan in PLANS:
        if plan.name in record.steps and plan.kind in record.timings:
            found = predicted(plan, model, record.profile(plan.kind, model))
            yield {
                "ranks": plan.mesh.size, "plan": plan.name, "rounds": len(record.steps[plan.name]),
                "step_s": statistics.median(record.steps[plan.name]), "predicted_s": found.step_s,
                "heap_bytes": statistics.median(record.heap_bytes[plan.name]), "predicted_bytes": found.peak_bytes,
            }  # fmt: skip


def correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, of ranks; equal values share theirs."""

    def ranked(values: list[float]) -> list[float]:
        return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]

    return statistics.correlation(ranked(a), ranked(b))


def table(found: list[dict[str, Any]], record: Record, model: Model) -> list[str]:
    shape = model.shape
    lines = [
        f"{record.machine}. {len(found)} plans, {shape.layers} layers of {shape.hidden}, vocabulary {shape.vocabulary}, "
        f"{model.sequences} sequences of {model.length} tokens, {min(row['rounds'] for row in found)} rounds",
        "",
        "| ranks | plan | step, s | predicted over it | heap, MiB | predicted over it |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['ranks']} | {row['plan']} | {row['step_s']:.3f} | {row['predicted_s'] / row['step_s']:.3f} "
        f"| {row['heap_bytes'] / 2**20:.0f} | {row['predicted_bytes'] / row['heap_bytes']:.3f} |"
        for row in found
    ]
    lines.append("")
    for ranks in (None, *sorted({row["ranks"] for row in found})):
        some = [row for row in found if ranks in (None, row["ranks"])]
        if len(some) > 2:
            lines.append(f"{'all' if ranks is None else f'{ranks} ranks'}: {summary(some)}")
    return lines


def summary(some: list[dict[str, Any]]) -> str:
    """Rank correlation, and the spread of both ratios."""
    told = [f"rank correlation {correlation([r['step_s'] for r in some], [r['predicted_s'] for r in some]):.3f}"]
    for name, mine, theirs in (("step", "predicted_s", "step_s"), ("heap", "predicted_bytes", "heap_bytes")):
        ratios = [row[mine] / row[theirs] for row in some]
        within = sum(abs(ratio - 1) <= 0.1 for ratio in ratios)
        told.append(f"{name} {min(ratios):.3f} to {max(ratios):.3f}, {within} of {len(ratios)} within 10%")
    return "; ".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True, help="what was measured; runs add to it")
    parser.add_argument("--ranks", type=int, choices=(2, 4), help="measure these alone [both]")
    parser.add_argument("--rounds", type=int, default=3, help="to add; 0 only tells what was measured")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = Model()
    for ranks in (args.ranks,) if args.ranks else (2, 4):
        if args.rounds:
            with heap.metered():
                launch(ranks, measure, ranks, model, args.rounds, args.record)
    record = Record.load(args.record)
    found = list(rows(record, model))
    if args.json:
        print(json.dumps({"machine": record.machine, "rows": found}, indent=2))
    elif found:
        print("\n".join(table(found, record, model)))


if __name__ == "__main__":
    main()
