"""Does a plan rank as the machine does? `python benchmarks/planning/ranking.py`

24 plans for 2 and 4 local ranks, pp, dp, cp and tp mixed, predicted and run for real on two cores: rank correlation of step
times (Spearman's), predicted over measured step, and the fullest rank's bytes on the heap, of all threads (`heap.py`).

    profile      parts are timed in the same run, by two ranks at once, also those of tp's shares; messages, gathers and sums too
    2 cores      four ranks share them: ranks of one core take turns by the clock in the prediction too, and rank r has core r mod 2
    rounds       every plan takes a step in every round; the median counts
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import heap

from helixpipe.mesh import MeshShape
from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Keeping
from helixpipe.predict.cost import PartCosts, action_seconds
from helixpipe.predict.estimate import Setting, priced
from helixpipe.predict.hardware import Link, named_accelerator, named_link
from helixpipe.predict.profile import Profile
from helixpipe.predict.standing import owned_and_visiting
from helixpipe.runtime.forked import run_forked
from helixpipe.schedule.action import Action
from helixpipe.schedule.lower import lower
from helixpipe.schedule.schedule import Schedule

if TYPE_CHECKING:
    from torch.distributed import Store

SHAPE = ModelShape(layers=8, hidden=256, heads=8, kv_heads=4, ffn=1024, vocabulary=1024)
LENGTH, SEQUENCES, CORES = 1024, 4, 2
LIMIT_S = 600.0


@dataclass(frozen=True)
class Planned:
    """One plan: a mesh, a family with its options, and what is kept."""

    mesh: MeshShape
    family: str = "1f1b"
    options: dict[str, int | str] = field(default_factory=dict)
    recompute: str = "none"

    def __str__(self) -> str:
        told = [f"{n} {s}" for n in ("pp", "dp", "cp", "tp") if (s := getattr(self.mesh, n)) > 1]
        told += [self.mesh.context_method] if self.mesh.cp > 1 else []
        schedule = [self.family, *(f"{n} {v}" for n, v in self.options.items())] if self.mesh.pp > 1 else []
        return ", ".join([*told, *schedule, f"recompute {self.recompute}"])

    @property
    def microbatches(self) -> int:
        return SEQUENCES // self.mesh.dp

    @property
    def setting(self) -> Setting:
        return Setting(
            SHAPE, LENGTH, named_accelerator("laptop-core"), named_link("free"), Keeping(self.recompute, 4),
            tensor_parallel=self.mesh.tp, context_parallel=self.mesh.cp, data_parallel=self.mesh.dp,
            context_method=self.mesh.context_method,
        ).of_family(self.family)  # fmt: skip

    def schedule(self) -> Schedule:
        return self.setting.build(self.family, self.mesh.pp, self.microbatches, **self.options)


def _mesh(pp: int = 1, dp: int = 1, cp: int = 1, tp: int = 1, method: str = "ring") -> MeshShape:
    return MeshShape(pp, dp, cp, tp, method)


PLANS = {
    2: (
        Planned(_mesh(2)),
        Planned(_mesh(2), recompute="full"),
        Planned(_mesh(2), "interleaved", {"stages_per_rank": 2}),
        Planned(_mesh(2), "seq1f1b", {"segments": 4}),
        Planned(_mesh(2), "seq1f1b_interleaved", {"segments": 2, "stages_per_rank": 2}, "selective"),
        Planned(_mesh(2), "zb_v"),
        Planned(_mesh(2), "helix", {"travel": "none"}, "selective"),
        Planned(_mesh(dp=2)),
        Planned(_mesh(dp=2), recompute="selective"),
        Planned(_mesh(cp=2)),
        Planned(_mesh(cp=2, method="ulysses"), recompute="full"),
        Planned(_mesh(tp=2)),
    ),
    4: (
        Planned(_mesh(4)),
        Planned(_mesh(4), "interleaved", {"stages_per_rank": 2}),
        Planned(_mesh(4), "seq1f1b", {"segments": 4}, "selective"),
        Planned(_mesh(2, dp=2)),
        Planned(_mesh(2, cp=2)),
        Planned(_mesh(2, tp=2)),
        Planned(_mesh(dp=4)),
        Planned(_mesh(dp=2, cp=2), recompute="selective"),
        Planned(_mesh(dp=2, tp=2)),
        Planned(_mesh(cp=4)),
        Planned(_mesh(cp=2, tp=2), recompute="full"),
        Planned(_mesh(tp=4)),
    ),
}


@dataclass
class Machine:
    """What was measured here."""

    profiles: dict[int, Profile]
    """By tp: of what one of so many ranks has of a layer, at all of its tokens."""
    message: Link
    gather: dict[int, Link]
    """By ranks: all of their shares to each, and the sum of shares scattered; seconds of the whole."""
    reduce: dict[int, Link]
    """By ranks: a sum over all."""


@dataclass(frozen=True)
class Shared:
    """Costs of one rank of a group of tp x cp, as `PartCosts`, from what was measured."""

    machine: Machine
    mesh: MeshShape

    def forward_s(self, part: Part, batch: Batch, segment: int) -> float:
        return self._price("forward_s", part, batch, segment) + self._messages_s(part, batch, segment)

    def input_s(self, part: Part, batch: Batch, segment: int) -> float:
        return self._price("input_s", part, batch, segment) + self._messages_s(part, batch, segment)

    def weight_s(self, part: Part, batch: Batch, segment: int) -> float:
        return self._price("weight_s", part, batch, segment)

    def _price(self, name: str, part: Part, batch: Batch, segment: int) -> float:
        mesh, profiles = self.mesh, self.machine.profiles
        if part.about.attends:  # each has its share of the pairs
            found: float = getattr(profiles[mesh.tp], name)(part, batch, segment) / mesh.cp
            return found
        divided = part.about.divides and part.about.has_parameters and part.kind != "norm"
        share = mesh.cp if divided else mesh.cp * mesh.tp
        lengths = tuple(max(1, length // share) for length in batch.segment_lengths)
        own: float = getattr(profiles[mesh.tp if divided else 1], name)(
            part, replace(batch, segment_lengths=lengths), segment
        )
        return own

    def _messages_s(self, part: Part, batch: Batch, segment: int) -> float:
        mesh, tokens = self.mesh, batch.tokens(segment) / self.mesh.cp
        found = 0.0
        if mesh.tp > 1 and part.about.exchanges:
            found += part.about.exchanges * self.machine.gather[mesh.tp].seconds(tokens * SHAPE.hidden * 4)
        if mesh.cp > 1 and part.about.attends:
            elements = 2 * tokens * SHAPE.kv_size / mesh.tp
            if mesh.context_method == "ulysses":
                elements = tokens * (2 * SHAPE.q_size + 2 * SHAPE.kv_size) / mesh.tp / mesh.cp
            found += (mesh.cp - 1) * self.machine.message.seconds(elements * 4)
        return found


def predicted(plan: Planned, machine: Machine) -> tuple[float, int]:
    """Seconds of a step, and the most bytes beyond weights on one rank."""
    setting, schedule = plan.setting, plan.schedule()
    costs: PartCosts = Shared(machine, plan.mesh)
    vars(setting)["costs"] = costs
    program = lower(schedule, SHAPE, setting.batch(schedule.segments))
    found = priced(program, setting)
    seconds = action_seconds(schedule, SHAPE, program.batches, costs, setting.keeping)
    group = plan.mesh.size // plan.mesh.pp
    step_s = makespan_s(schedule, lambda action: seconds(action) * max(1, group // CORES), group == 1)
    replicas = plan.mesh.dp * plan.mesh.cp
    owned, _ = owned_and_visiting(schedule, setting.share)
    gradients = [4 * sum(each.values()) for each in owned]
    if group > 1:
        among = group if replicas > 1 else plan.mesh.tp
        step_s += machine.reduce[among].seconds(max(gradients) if replicas > 1 else 0.3 * max(gradients))
    peaks = zip(found.timeline.peak_activation_bytes, gradients, strict=True)
    return step_s, max(activations + held for activations, held in peaks)


def makespan_s(schedule: Schedule, seconds: Callable[[Action], float], spread: bool) -> float:
    """A step where ranks share cores: those of a core that have something to do take turns. Messages are not counted.

    `spread`: pipeline rank r has core r mod CORES; else every core has one of each.
    """
    core = [rank % CORES if spread else 0 for rank in range(len(schedule.ranks))]
    at = [0] * len(core)
    left: dict[int, float] = {}
    done: set[Action] = set()
    clock = 0.0
    while True:
        for rank, order in enumerate(schedule.ranks):
            free = rank not in left and at[rank] < len(order)
            if free and all(needed in done for needed in schedule.dependencies(order[at[rank]])):
                left[rank] = seconds(order[at[rank]])
        if not left:
            return clock
        sharing = [sum(core[other] == core[rank] for other in left) for rank in range(len(core))]
        step_s = min(remaining * sharing[rank] for rank, remaining in left.items())
        clock += step_s
        for rank in list(left):
            left[rank] -= step_s / sharing[rank]
            if left[rank] <= 1e-12:
                del left[rank]
                done.add(schedule.ranks[rank][at[rank]])
                at[rank] += 1


@dataclass
class Job:
    """What local ranks do: with two of them parts are timed first."""

    ranks: int
    rounds: int
    limit_s: float = LIMIT_S

    def prepare(self) -> None:
        import helixpipe.runtime.pipeline
        import helixpipe.runtime.profiling  # noqa: F401

    def run(self, rank: int, store: Store) -> dict[str, Any]:
        import torch
        import torch.distributed as dist

        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % min(CORES, len(cores))]})
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=self.ranks, timeout=timedelta(seconds=LIMIT_S)
        )
        measured = self._measure_parts() if self.ranks == CORES else {}
        return {"machine": measured | self._measure_messages(), "plans": self._steps()}

    def _measure_parts(self) -> dict[str, Any]:
        import torch
        import torch.distributed as dist

        from helixpipe.runtime.profiling import default_cuts, measure, measure_link

        found = {}
        for tp in (1, 2, 4):
            shape = SHAPE.tensor_share(tp) if tp > 1 else SHAPE
            found[tp] = measure(
                shape, "cpu", torch.float32, default_cuts(shape, LENGTH), self.rounds, dist.barrier
            ).to_json()
        return {"profiles": found, "message": measure_link("cpu")}

    def _measure_messages(self) -> dict[str, Any]:
        """Gathers and sums among all ranks, of two sizes: a line through both."""
        import torch
        import torch.distributed as dist

        def timed(call: Callable[[Any], Any], nbytes: int) -> float:
            x = torch.zeros(nbytes // 4)
            each = []
            for _ in range(7):
                dist.barrier()
                begun = time.perf_counter()
                call(x)
                each.append(time.perf_counter() - begun)
            return statistics.median(each)

        def line(call: Callable[[Any], Any], least: int, most: int) -> Link:
            short, long = timed(call, least), timed(call, most)
            byte_s = max((long - short) / (most - least), 1e-15)
            return Link("measured", 1 / byte_s, max(0.0, short - least * byte_s), "this run")

        def gather(x: Any) -> None:
            mine = x[: len(x) // self.ranks]
            dist.all_gather([torch.empty_like(mine) for _ in range(self.ranks)], mine)

        return {"gather": line(gather, 2**16, 2**21), "reduce": line(dist.all_reduce, 2**20, 2**24)}

    def _steps(self) -> list[dict[str, Any]]:
        import torch
        import torch.distributed as dist

        from helixpipe.model.decoder import Decoder
        from helixpipe.runtime.mesh import make_device_mesh
        from helixpipe.runtime.pipeline import Pipeline

        generator = torch.Generator().manual_seed(0)
        tokens, targets = (torch.randint(SHAPE.vocabulary, (SEQUENCES, LENGTH), generator=generator) for _ in range(2))
        pipelines = []
        for plan in PLANS[self.ranks]:
            schedule = plan.schedule()
            lengths = plan.setting.batch(schedule.segments).segment_lengths if schedule.segments > 1 else None
            mesh = make_device_mesh(plan.mesh, "cpu", LIMIT_S)
            pipelines.append(
                Pipeline(
                    Decoder(SHAPE), schedule, mesh, recompute=plan.recompute, segment_lengths=lengths, timeout_s=LIMIT_S,
                    context_method=plan.mesh.context_method,
                )
            )  # fmt: skip

        def step(pipeline: Pipeline) -> None:
            pipeline.zero_gradients()
            pipeline.step(tokens, targets)

        heaps = []
        for pipeline in pipelines:
            step(pipeline)
            pipeline.zero_gradients()
            heaps.append(heap.over_before(lambda pipeline=pipeline: pipeline.step(tokens, targets)))
        seconds: list[list[float]] = [[] for _ in pipelines]
        for turn in range(self.rounds):
            for which in range(len(pipelines)):
                place = (which + turn) % len(pipelines)
                dist.barrier()
                begun = time.perf_counter()
                step(pipelines[place])
                dist.barrier()
                seconds[place].append(time.perf_counter() - begun)
        for pipeline in pipelines:
            pipeline.close()
        return [{"seconds": each, "heap_bytes": most} for each, most in zip(seconds, heaps, strict=True)]


def measured(rounds: int) -> tuple[Machine, dict[int, list[dict[str, Any]]]]:
    """The machine, and of each number of ranks what its plans took."""
    found: dict[int, list[dict[str, Any]]] = {}
    machine: Machine | None = None
    with heap.metered():
        for ranks, plans in PLANS.items():
            each = run_forked(Job(ranks, rounds))
            first = each[0]["machine"]
            if machine is None:
                profiles = {tp: Profile.from_json(text) for tp, text in first["profiles"].items()}
                machine = Machine(profiles, first["message"], {}, {})
            machine.gather[ranks], machine.reduce[ranks] = first["gather"], first["reduce"]
            found[ranks] = [
                {
                    "plan": plan,
                    "step_s": statistics.median(each[0]["plans"][at]["seconds"]),
                    "heap_bytes": max(rank["plans"][at]["heap_bytes"] for rank in each),
                }
                for at, plan in enumerate(plans)
            ]
    assert machine is not None
    return machine, found


def spearman(a: list[float], b: list[float]) -> float:
    """Correlation of ranks."""
    n = len(a)
    ranks = [[sorted(values).index(value) for value in values] for values in (a, b)]
    return 1 - 6 * sum((x - y) ** 2 for x, y in zip(*ranks, strict=True)) / (n * (n**2 - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    machine, found = measured(args.rounds)
    rows = []
    for ranks, plans in found.items():
        for each in plans:
            step_s, held = predicted(each["plan"], machine)
            rows.append(
                {
                    "ranks": ranks, "plan": str(each["plan"]), "step_s": each["step_s"], "predicted_s": step_s,
                    "heap_bytes": each["heap_bytes"], "predicted_bytes": held,
                }
            )  # fmt: skip
    correlation = spearman([row["step_s"] for row in rows], [row["predicted_s"] for row in rows])
    if args.json:
        print(json.dumps({"rows": rows, "rank_correlation": correlation}, indent=2))
        return
    print("\n".join(table(rows, correlation)))


def table(rows: list[dict[str, Any]], correlation: float) -> list[str]:
    lines = [
        f"{len(rows)} plans, {SHAPE.layers} layers of {SHAPE.hidden}, {SEQUENCES} sequences of {LENGTH}; rank correlation {correlation:.3f}",
        "",
        "| ranks | plan | step, s | predicted over it | heap, MiB | predicted over it |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['ranks']} | {row['plan']} | {row['step_s']:.3f} | {row['predicted_s'] / row['step_s']:.3f} "
        f"| {row['heap_bytes'] / 2**20:.0f} | {row['predicted_bytes'] / row['heap_bytes']:.3f} |"
        for row in rows
    ]
    worst = [
        max(abs(math.log(row[a] / row[b])) for row in rows)
        for a, b in (("predicted_s", "step_s"), ("predicted_bytes", "heap_bytes"))
    ]
    return [*lines, "", f"worst: step {math.expm1(worst[0]):.0%}, heap {math.expm1(worst[1]):.0%}"]


if __name__ == "__main__":
    main()
