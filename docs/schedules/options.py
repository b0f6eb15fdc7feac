"""What the families and their options cost in time and memory, simulated: `python docs/schedules/options.py [M]`.

Prints the tables of docs/schedules/README.md, for M micro-batches (16). Every row is the same training step of the same model, lowered
and simulated message by message; the numbers that describe the machine are the constants below.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from helixpipe.parts.part import chain
from helixpipe.parts.shapes import named_shape
from helixpipe.parts.work import Batch, Keeping
from helixpipe.predict.memory import peak_activation_bytes
from helixpipe.predict.simulate import simulate_program
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower
from helixpipe.schedule.program import Kind, Message, Program

RANKS = 8
SHAPE = named_shape("7b")
BATCH = Batch(microbatch_size=1, segment_lengths=(131072,))
FLOPS_PER_S = 400e12  # one rank, sustained
BYTES_PER_S = 50e9  # of a rank's link, each way; its messages share it
CHUNK = 8192  # tokens of the chunked MLP and head
ELEMENT_BYTES = 2  # bf16; gradients of weights travel in float32

ROWS: list[tuple[str, str, dict[str, object]]] = [
    ("gpipe", "none", {}),
    ("1f1b", "none", {}),
    ("gpipe", "selective", {}),
    ("1f1b", "selective", {}),
    ("helix", "selective", {"folds": 1}),
    ("helix", "selective", {"folds": 1, "groups": "forward_first"}),
    ("helix", "selective", {"folds": 2}),
    ("helix", "selective", {"folds": 2, "groups": "forward_first"}),
    ("helix", "selective", {"folds": 2, "travel": "qkv"}),
    ("helix", "selective", {"folds": 2, "travel": "attention"}),
    ("helix", "none", {"folds": 2, "travel": "attention"}),
]


def main() -> None:
    print("\n".join(table(int(sys.argv[1]) if len(sys.argv) > 1 else 16)))


def table(microbatches: int) -> list[str]:
    """The lines of the table; rows that the number of micro-batches makes the same as another are left out."""
    lines = [
        "| family | options | recompute | time, free messages | time, with messages | GiB sent a rank | GiB held, peak |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    keeping = {name: Keeping(name, ELEMENT_BYTES, CHUNK, CHUNK, device="cuda") for name in ("none", "selective")}
    for family, recompute, options in ROWS:
        if options.get("folds") == 2 and "groups" in options and microbatches <= 2 * RANKS:
            continue  # a single group
        schedule = build_schedule(family, ranks=RANKS, layers=SHAPE.layers, microbatches=microbatches, **options)
        program = lower(schedule, SHAPE, BATCH)
        seconds = durations(program, recompute)
        free = simulate_program(program, seconds).makespan_s
        taxed = simulate_program(program, seconds, lambda m: message_bytes(m) / BYTES_PER_S).makespan_s
        sent = [sum(message_bytes(m) for m in program.messages if m.src == rank) for rank in range(RANKS)]
        kept = peak_activation_bytes(program, keeping[recompute])
        told = ", ".join(f"{name} {value}" for name, value in options.items()) or "-"
        ratios = [f"{makespan / perfect_s(microbatches):.3f}" for makespan in (free, taxed)]
        lines.append(f"| {family} | {told} | {recompute} | {' | '.join(ratios)} | {_range(sent)} | {_range(kept)} |")
    return lines


def perfect_s(microbatches: int) -> float:
    """The step on ranks that are never idle and recompute nothing."""
    flops = sum(
        SHAPE.forward_flops(part, BATCH, 0) + SHAPE.backward_flops(part, BATCH, 0) for part in chain(SHAPE.layers)
    )
    return flops * microbatches / RANKS / FLOPS_PER_S


def durations(program: Program, recompute: str) -> Callable[[Action], float]:
    """Action -> seconds: its FLOPs; a selective backward runs all but the attention kernel again."""
    table = {}
    for s, stage in enumerate(program.schedule.stages):
        forward = sum(SHAPE.forward_flops(part, BATCH, 0) for part in stage.parts)
        attention = sum(SHAPE.forward_flops(part, BATCH, 0) for part in stage.parts if part.kind == "attn")
        backward = sum(SHAPE.backward_flops(part, BATCH, 0) for part in stage.parts)
        again = forward - attention if recompute == "selective" else 0.0
        table[s, Pass.F], table[s, Pass.B] = forward / FLOPS_PER_S, (backward + again) / FLOPS_PER_S

    def seconds(action: Action) -> float:
        return table[action.stage, action.kind]

    return seconds


def message_bytes(message: Message) -> int:
    return message.elements * (4 if message.kind is Kind.WEIGHT_GRADIENTS else ELEMENT_BYTES)


def _range(numbers: Sequence[int]) -> str:
    low, high = (f"{number / 2**30:.0f}" for number in (min(numbers), max(numbers)))
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    main()
