"""What does it bring to know where documents are? `python benchmarks/documents/run.py`

2 ranks, one core and one thread each. Every step is another batch of documents whose lengths are drawn from a law, and every
contender takes the same steps. Compared with the perfect split of the *work*: one core that does all of a step, documents masked
and nothing sent, in half the time. Beside it the same is simulated for 8 ranks, a 7B model and 128k tokens.

--predicted: instead, 20 steps of other batches each, their measured seconds beside those that a profile taken between them predicts.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from peers import interleaved, launch, machine, predicted_step
from torch.distributed.device_mesh import DeviceMesh

from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.shapes import named_shape
from helixpipe.parts.work import Batch, Keeping, Lengths
from helixpipe.predict.estimate import Setting, estimate
from helixpipe.predict.hardware import named_accelerator, named_link
from helixpipe.predict.profile import Profile, Timing, merged
from helixpipe.predict.timeline import Timeline
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.runtime.profiling import WARMUP, Parts, default_cuts, measure_link
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.families.helix import by_work
from helixpipe.schedule.lower import lower
from helixpipe.schedule.schedule import Schedule
from helixpipe.train.balance import LengthWork
from helixpipe.train.packing import Packs
from helixpipe.train.reading import Reading

RANKS = 2
SPLIT = "perfect split of the work"
SHORT = (32, 128)
"""A profile has sequences as short as documents too: such shares of a whole one."""


@dataclass(frozen=True)
class Law:
    """Documents' lengths in tokens: exp(N(log median, sigma)), and as often as `fills` says a whole sequence."""

    name: str
    median: float
    sigma: float
    fills: float = 0.0

    def lengths(self, count: int, longest: int, seed: int) -> NDArray[np.int64]:
        draw = np.random.default_rng(seed)
        found = np.exp(draw.normal(math.log(self.median), self.sigma, count))
        found[draw.random(count) < self.fills] = longest
        return np.clip(found, 2, longest).astype(np.int64)


# name -> the median as a share of the sequence, sigma, how often one fills it
LAWS = {
    "long tail": (1 / 16, 1.3, 0.0),
    "some fill a sequence": (1 / 32, 1.0, 0.03),
    "one fills each sequence": (1 / 32, 1.0, 1.0),
}


@dataclass(frozen=True)
class Contender:
    """A family, and what it knows of documents."""

    family: str
    options: dict[str, Any] = field(default_factory=dict)
    masked: bool = True
    packing: str = "documents"
    aware: bool = False
    """Whether segments are cut by documents; of helix, whether micro-batches take their places by their work."""

    def __str__(self) -> str:
        knows = ["documents masked" if self.masked else "windows, no masks"]
        knows += ["balanced"] if self.packing == "balanced" else []
        if self.aware:
            knows += ["placed by work" if self.family == "helix" else "cut by documents"]
        folds = self.options.get("folds", 2)
        return f"{self.family}{f' of {folds} folds' if folds != 2 else ''}: {', '.join(knows)}"

    def causal_only(self) -> bool:
        return "segments" in self.options


SEGMENTS, LOOPED = {"segments": 4}, {"segments": 2, "stages_per_rank": 2}
FOLDS, MORE_FOLDS = {"folds": 2, "travel": "qkv"}, {"folds": 4, "travel": "qkv"}
CONTENDERS = (
    Contender("1f1b", masked=False),
    Contender("1f1b"),
    Contender("1f1b", packing="balanced"),
    Contender("zb_v"),
    Contender("seq1f1b", SEGMENTS, masked=False),
    Contender("seq1f1b", SEGMENTS),
    Contender("seq1f1b", SEGMENTS, aware=True),
    Contender("seq1f1b", SEGMENTS, packing="balanced", aware=True),
    Contender("seq1f1b_interleaved", LOOPED, aware=True),
    Contender("helix", FOLDS, masked=False),
    Contender("helix", FOLDS),
    Contender("helix", FOLDS, aware=True),
    Contender("helix", MORE_FOLDS, aware=True),
    Contender("helix", FOLDS, packing="balanced"),
    Contender("helix", FOLDS, packing="balanced", aware=True),
)


def readings(shape: ModelShape, law: Law, length: int, microbatches: int, seed: int) -> dict[str, Reading]:
    """By packing: what training reads, from lengths alone."""
    lengths = law.lengths(20_000, length, seed)
    ends = np.cumsum(lengths + 1)  # one token more than positions
    packs = Packs(ends, length, "cut", True, seed)
    more = {"documents": 0, "balanced": 8}
    return {
        packing: Reading((packs,), (1.0,), length, microbatches, seed=seed, look_ahead=ahead, work=LengthWork(shape))
        for packing, ahead in more.items()
    }


def attention_work(shape: ModelShape, row: Sequence[int]) -> float:
    """Pairs of a token and a key that it sees."""
    return Batch(1, (sum(row),), (tuple(row),)).pairs(0, shape.causal)


def placed(each: Contender, shape: ModelShape, ranks: int, documents: Lengths) -> Lengths:
    """The step's rows in the order in which the contender takes them."""
    if each.family != "helix" or not each.aware:
        return documents
    work = [attention_work(shape, row) for row in documents]
    return tuple(documents[row] for row in by_work(work, ranks, each.options["folds"]))


def small(args: argparse.Namespace) -> ModelShape:
    return ModelShape(
        layers=args.layers, hidden=args.hidden, heads=args.heads, ffn=4 * args.hidden, vocabulary=256, mlp="gelu",
        norm="layer", causal=not args.bidirectional,
    )  # fmt: skip


def pipeline_of(each: Contender, shape: ModelShape, args: argparse.Namespace) -> Pipeline:
    schedule = build_schedule(
        each.family, ranks=RANKS, layers=shape.layers, microbatches=args.microbatches, **each.options
    )
    lengths = None
    if schedule.segments > 1 and not each.aware:  # as sequences of one document are cut
        lengths = Setting(shape, args.length, keeping=Keeping("none", 4)).segment_lengths(schedule.segments)
    return Pipeline(Decoder(shape), schedule, recompute="none", segment_lengths=lengths)


def alone(shape: ModelShape, args: argparse.Namespace) -> Pipeline:
    """All of a step on this rank, with nobody to wait for."""
    groups = [dist.new_group([rank]) for rank in range(RANKS)]
    mesh = DeviceMesh.from_group(groups[dist.get_rank()], "cpu", mesh_dim_names=("pp",))
    schedule = build_schedule("1f1b", ranks=1, layers=shape.layers, microbatches=args.microbatches)
    return Pipeline(Decoder(shape), schedule, mesh, recompute="none")


def batch_of(args: argparse.Namespace, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    tokens, targets = (torch.randint(256, (args.microbatches, args.length), generator=draw) for _ in range(2))
    return tokens, targets


def contenders(args: argparse.Namespace) -> list[Contender]:
    words = [word.strip() for word in args.only.split(",") if word.strip()]
    found = [each for each in CONTENDERS if not (args.bidirectional and each.causal_only())]
    return [each for each in found if all(word in str(each) for word in words)]


def worker(rank: int, args: argparse.Namespace) -> None:
    shape = small(args)
    result: dict[str, Any] = {"machine": machine(), "laws": {}}
    pipelines = {str(each): pipeline_of(each, shape, args) for each in contenders(args)}
    reference = alone(shape, args)
    for name, (median, sigma, fills) in LAWS.items():
        if args.law not in ("", name):
            continue
        law = Law(name, median * args.length, sigma, fills)
        read = readings(shape, law, args.length, args.microbatches, args.seed)
        splits = {packing: f"{SPLIT}, {packing}" for packing in read}  # packings deal the same documents to other steps
        taken = {str(each): 0 for each in contenders(args)} | dict.fromkeys(splits.values(), 0)

        def step(each: Contender, read: dict[str, Reading] = read, taken: dict[str, int] = taken) -> None:
            taken[str(each)] += 1
            documents = placed(each, shape, RANKS, read[each.packing].documents(taken[str(each)]))
            pipeline = pipelines[str(each)]
            pipeline.zero_gradients()
            pipeline.step(*batch_of(args, taken[str(each)]), documents=documents if each.masked else None)

        def split(packing: str, read: dict[str, Reading] = read, taken: dict[str, int] = taken) -> None:
            name = f"{SPLIT}, {packing}"
            taken[name] += 1
            reference.zero_gradients()
            reference.step(*batch_of(args, taken[name]), documents=read[packing].documents(taken[name]))

        steps: dict[str, Callable[[], None]] = {str(each): lambda each=each: step(each) for each in contenders(args)}
        steps |= {each: lambda packing=packing: split(packing) for packing, each in splits.items()}
        seconds = interleaved(steps, args.steps, warmup=1)
        rows = {
            str(each): {
                "over_split": sum(seconds[str(each)]) / (sum(seconds[splits[each.packing]]) / RANKS),
                "median_s": statistics.median(seconds[str(each)]),
            }
            for each in contenders(args)
        }
        result["laws"][name] = {"lengths": vars(law), "rows": rows}
        if rank == 0:
            print(
                f"{name}: " + ", ".join(f"{each} {row['over_split']:.3f}" for each, row in rows.items()),
                file=sys.stderr,
            )
    if rank == 0:
        result |= {key: getattr(args, key) for key in ("layers", "hidden", "heads", "length", "microbatches", "steps")}
        print(json.dumps(result, indent=2) if args.json else table(result))


def table(result: dict[str, Any]) -> str:
    laws = list(result["laws"])
    lines = [
        f"{result['machine']}. L={result['layers']} h={result['hidden']} s={result['length']} m={result['microbatches']}, "
        f"{result['steps']} steps",
        "",
        f"| over the perfect split of the work | {' | '.join(laws)} |",
        "| --- |" + " --- |" * len(laws),
    ]
    for name in result["laws"][laws[0]]["rows"]:
        cells = (f"{result['laws'][law]['rows'][name]['over_split']:.3f}" for law in laws)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def simulated(args: argparse.Namespace) -> str:
    """The same for p=8, 7B and 128k tokens: of each contender the mean step over the ideal one of the masked work."""
    lines = []
    for causal in (True, False):
        shape = named_shape("7b") if causal else ModelShape(**{**vars(named_shape("7b")), "causal": False})
        setting = Setting(
            shape, 131072, named_accelerator("h20"), named_link("infiniband"), Keeping("selective", 2, device="cuda"),
            tensor_parallel=8, tensor_link=named_link("nvlink"),
        )  # fmt: skip
        lines += [
            f"{'causal' if causal else 'bidirectional'}, 7B, p=8, tp=8, m=16, 131072 tokens, H20, {args.simulated_steps} steps",
            "",
            f"| over the ideal of the masked work | {' | '.join(LAWS)} |",
            "| --- |" + " --- |" * len(LAWS),
        ]
        for each in CONTENDERS:
            if causal or not each.causal_only():
                cells = (f"{over_ideal(each, setting, law, args):.3f}" for law in LAWS)
                lines.append(f"| {each} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def over_ideal(each: Contender, setting: Setting, law: str, args: argparse.Namespace) -> float:
    median, sigma, fills = LAWS[law]
    ranks, microbatches, shape = 8, 16, setting.shape
    reading = readings(
        shape,
        Law(law, median * setting.sequence_length, sigma, fills),
        setting.sequence_length,
        microbatches,
        args.seed,
    )[each.packing]
    schedule = build_schedule(each.family, ranks=ranks, layers=shape.layers, microbatches=microbatches, **each.options)
    whole, step_s, ideal_s = setting.batch(schedule.segments), 0.0, 0.0
    for step in range(1, args.simulated_steps + 1):
        documents = placed(each, shape, ranks, reading.documents(step))
        masked = [Batch(1, whole.segment_lengths, (row,)) for row in documents]
        batches = [setting.batch(schedule.segments, (row,)) for row in documents] if each.aware else masked
        step_s += estimate(schedule, setting, batches if each.masked else whole).step_s
        ideal_s += math.fsum(setting.batch_s(batch) for batch in masked) / ranks
    return step_s / ideal_s


def lowering(args: argparse.Namespace) -> str:
    """Processor seconds of lowering a step whose 16 micro-batches all differ, for 8 ranks and 8 segments, the best of 5."""
    shape, length, lines = named_shape("7b"), 131072, ["| schedule | 16 batches | all alike |", "| --- | --- | --- |"]
    law = Law("long tail", LAWS["long tail"][0] * length, LAWS["long tail"][1])
    rows = readings(shape, law, length, 16, args.seed)["documents"].documents(1)
    for family, more in {"seq1f1b": {}, "seq1f1b_interleaved": {"stages_per_rank": 2}}.items():
        schedule = build_schedule(family, ranks=8, layers=shape.layers, microbatches=16, segments=8, **more)
        setting = Setting(shape, length)
        differ = [setting.batch(8, (row,)) for row in rows]
        lines.append(
            f"| {family} | {best_s(schedule, shape, differ):.3f} s | {best_s(schedule, shape, setting.batch(8)):.3f} s |"
        )
    return "\n".join(lines)


def best_s(schedule: Schedule, shape: ModelShape, batches: Batch | Sequence[Batch]) -> float:
    found = []
    for _ in range(5):
        begun = time.process_time()
        lower(schedule, shape, batches)
        found.append(time.process_time() - begun)
    return min(found)


def predictions(rank: int, args: argparse.Namespace) -> None:
    """Steps of other batches each, and what a profile of medians says of them."""
    shape = small(args)
    chosen = [each for each in contenders(args) if each.masked and each.aware]
    pipelines = {str(each): pipeline_of(each, shape, args) for each in chosen}
    law = Law("long tail", LAWS["long tail"][0] * args.length, LAWS["long tail"][1])
    read = readings(shape, law, args.length, args.microbatches, args.seed)
    parts = Parts(shape, "cpu", torch.float32)
    cuts = (*default_cuts(shape, args.length), *((args.length // n,) for n in SHORT))
    runs: list[Timing] = []
    measured: dict[str, list[tuple[Any, Timeline]]] = {name: [] for name in pipelines}

    def profile_round() -> None:
        for cut in cuts:
            dist.barrier()
            runs.extend(parts.run(cut))

    def step(each: Contender) -> None:
        pipeline, number = pipelines[str(each)], len(measured[str(each)]) + 1
        documents = placed(each, shape, RANKS, read[each.packing].documents(number))
        pipeline.zero_gradients()
        pipeline.step(*batch_of(args, number), documents=documents)
        measured[str(each)].append((pipeline.last_program, pipeline.timeline()))

    for _ in range(WARMUP):
        profile_round()
    runs.clear()
    steps = {str(each): lambda each=each: step(each) for each in chosen}
    interleaved({"profile": profile_round, **steps}, args.steps, warmup=1)
    found: list[str] = [""] * RANKS
    dist.all_gather_object(found, parts.profile(runs).to_json())
    profile = merged([Profile.from_json(text) for text in found], measure_link("cpu"))
    if rank:
        return
    print(f"{machine()}; worst fit error {profile.worst_error:.0%}; {args.steps} steps, each of another batch")
    print(
        "\n| schedule | predicted over measured, median | least | most | within 10% |\n| --- | --- | --- | --- | --- |"
    )
    for each in chosen:
        ratios = []
        for program, timeline in measured[str(each)][1:]:
            ratios.append(predicted_step(program, profile, Keeping("none", 4)).makespan_s / timeline.makespan_s)
        within = sum(0.9 <= ratio <= 1.1 for ratio in ratios)
        print(
            f"| {each} | {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} | {within} of {len(ratios)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--only", default="", help="comma separated: words that are all in the names of those to run")
    parser.add_argument("--law", default="", help="a law's name: that one alone")
    parser.add_argument("--predicted", action="store_true")
    parser.add_argument("--simulated", action="store_true", help="instead: 8 ranks, simulated; no process is started")
    parser.add_argument("--simulated-steps", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--lowering", action="store_true", help="instead: what lowering a step of differing batches takes"
    )
    args = parser.parse_args()
    if args.lowering:
        print(lowering(args))
        return
    if args.simulated:
        print(simulated(args))
        return
    launch(RANKS, predictions if args.predicted else worker, args)


if __name__ == "__main__":
    main()
