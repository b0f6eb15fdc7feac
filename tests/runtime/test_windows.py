"""Windows, capped scores and a scale in whole models: loss to 1e-12 and gradients to 1e-9 of plain autograd, in float64.

What segments keep and owe of a window is counted and predicted, and held to the heap in `test_heap`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from coverings import covering, pairs
from oracle import batch, plain_step
from ranks import Ranks, mesh_of

from helixpipe.model import merging
from helixpipe.model.attention import KeyValues
from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch, Keeping
from helixpipe.predict.memory import held_bytes
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower

LENGTH, LENGTHS = 12, {1: (12,), 2: (7, 5), 3: (6, 1, 5), 5: (4, 3, 2, 2, 1)}
RECOMPUTE = ("none", "full", "selective")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("1f1b", {}),
    ("interleaved", {"stages_per_rank": 2}),
    ("zb_v", {}),
    *(("seq1f1b", {"segments": k}) for k in (2, 3, 5)),
    *(("seq1f1b_interleaved", {"segments": k, "stages_per_rank": 2}) for k in (3, 5)),
    ("seq1f1b_zb", {"segments": 3}),
    *(("helix", {"travel": travel}) for travel in ("none", "qkv", "attention")),
]
PATTERNS: tuple[tuple[bool, ...], ...] = ((True, False), (), (False, True, True))


@dataclass(frozen=True)
class Case:
    family: str
    ranks: int
    window: int
    pattern: tuple[bool, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    recompute: str = "selective"
    causal: bool = True
    softcap: float = 0.0
    scale: float = 0.0

    def __str__(self) -> str:
        words = [self.family, f"p{self.ranks}", f"w{self.window}", "".join("-w"[each] for each in self.pattern)]
        words += [f"{name}={value}" for name, value in self.options.items()]
        words += [self.recompute, "" if self.causal else "both ways", f"cap{self.softcap}" if self.softcap else ""]
        return " ".join(word for word in words if word)

    @property
    def shape(self) -> ModelShape:
        return ModelShape(
            layers=6 if self.ranks == 3 else 4, hidden=16, heads=4, kv_heads=2, ffn=24, vocabulary=19,
            tied=self.ranks == 2, causal=self.causal, window=self.window, window_pattern=self.pattern,
            softcap=self.softcap, attention_scale=self.scale,
        )  # fmt: skip


def product() -> Iterator[Case]:
    for (family, given), ranks in itertools.product(VARIANTS, (1, 2, 3)):
        windows = (1, 2, 5, 12) if ranks != 2 else (3, 7, 20)
        both_ways = (True,) if "segments" in given else (True, False)
        rest = itertools.product(windows, PATTERNS, (given,), RECOMPUTE, both_ways, (0.0, 0.03), (0.0, 0.5))
        yield from (Case(family, ranks, *each) for each in rest)


def meetings(case: Case) -> list[Hashable]:
    """Every variant on every number of ranks, in every pattern and under every policy; every two of all else, and every
    window in every family and in every cut into segments."""
    variant, segments = (case.family, *case.options.items()), case.options.get("segments", 1)
    rest = pairs(case.ranks, case.window, case.pattern, case.recompute, case.causal, case.softcap, case.scale)
    of_variant = [(variant, case.ranks), (variant, case.pattern), (variant, case.recompute)]
    return [*rest, *of_variant, (case.family, case.window), (segments, case.window)]


def run_case(case: Case) -> tuple[float, float, dict[str, torch.Tensor]] | None:
    mesh = mesh_of(case.ranks)
    if mesh is None:
        return None
    schedule = build_schedule(case.family, ranks=case.ranks, layers=case.shape.layers, microbatches=4, **case.options)
    pipeline = Pipeline(
        Decoder(case.shape), schedule, mesh, dtype=torch.float64, recompute=case.recompute, timeout_s=30,
        segment_lengths=LENGTHS[case.options.get("segments", 1)],
    )  # fmt: skip
    data = batch(case.shape, 4, LENGTH)
    loss = pipeline.step(*data)
    assert pipeline._ledger.bytes == 0
    evaluated = pipeline.evaluate(*data)
    assert pipeline._ledger.bytes == 0
    pipeline.close()
    return loss, evaluated, {name: p.grad for name, p in pipeline.parameters.items()}


@functools.cache
def oracle(shape: ModelShape) -> tuple[float, dict[str, torch.Tensor]]:
    return plain_step(shape, *batch(shape, 4, LENGTH))


@pytest.mark.parametrize("case", covering(product(), meetings), ids=str)
def test_gradients(four_ranks: Ranks, case: Case) -> None:
    holds(four_ranks, case)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("place", range(len(VARIANTS)))
def test_gradients_full_product(four_ranks: Ranks, place: int) -> None:
    """7,128 cases: `make test-full`."""
    family, given = VARIANTS[place]
    for case in product():
        if (case.family, case.options) == (family, given):
            holds(four_ranks, case)


def holds(four_ranks: Ranks, case: Case) -> None:
    loss, gradients = oracle(case.shape)
    found: dict[str, torch.Tensor] = {}
    for result in four_ranks.run(run_case, case)[: case.ranks]:
        assert abs(result[0] - loss) < 1e-12
        assert abs(result[1] - loss) < 1e-12
        found |= result[2]
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-30)
        # one key in the window has all the weight, whatever q and k are
        nothing = case.window == 1 and max(gradient.norm(), found[name].norm()) < 1e-16
        assert error < 1e-9 or nothing, f"{name}: {error:.1e}"


def test_the_window_changes_what_is_computed() -> None:
    """Or the tests above would hold of models that ignore it."""
    plain = Case("1f1b", 1, 0).shape
    losses = {oracle(Case("1f1b", 1, window, pattern).shape)[0] for window in (1, 2, 5, 12) for pattern in PATTERNS}
    assert len(losses | {oracle(plain)[0]}) == 10  # of 12 tokens a window of 12 shows all


LENGTHS_OF_64 = {(24, 20, 20): (1, 2, 9, 21, 30, 64), (16, 4, 12, 4, 28): (3, 6, 14, 18)}


def kept_bytes(lengths: tuple[int, ...], window: int, recompute: str) -> tuple[list[int], list[int]]:
    """After each action of a step: measured, and predicted."""
    shape = ModelShape(
        layers=2, hidden=64, heads=4, ffn=128, vocabulary=64, mlp="gelu", norm="layer", window=window,
        window_pattern=(window > 0, False),
    )  # fmt: skip
    schedule = build_schedule("seq1f1b", ranks=1, layers=2, microbatches=2, segments=len(lengths))
    pipeline = Pipeline(Decoder(shape), schedule, recompute=recompute, segment_lengths=lengths)
    pipeline.step(*batch(shape, 2, 64))
    program = lower(schedule, shape, Batch(1, lengths))
    measured = [point.kept_bytes for point in pipeline.timeline().memory[0][1::2]]
    return measured, [each.left_bytes for each in held_bytes(program, Keeping(recompute))[0]]


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize(
    ("lengths", "window"), [(lengths, window) for lengths, some in LENGTHS_OF_64.items() for window in some]
)
def test_what_is_kept_and_owed_is_counted_and_predicted(lengths: tuple[int, ...], window: int, recompute: str) -> None:
    measured, predicted = kept_bytes(lengths, window, recompute)
    assert measured == predicted


@pytest.mark.parametrize(("lengths", "window"), [((24, 20, 20), 9), ((16, 4, 12, 4, 28), 14)])
def test_of_a_graph_only_what_is_owed_changes(lengths: tuple[int, ...], window: int) -> None:
    """It has all keys and values itself. What little a norm keeps beside is not predicted, and is the same without a window."""
    (with_it, foreseen), (without, foreseen_without) = (kept_bytes(lengths, w, "none") for w in (window, 0))
    differences = [a - b for a, b in zip(with_it, without, strict=True)]
    assert differences == [a - b for a, b in zip(foreseen, foreseen_without, strict=True)]
    assert min(differences) < 0 == max(differences)


def test_a_segment_keeps_the_keys_that_a_later_one_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a full recompute: all keys and values at the end of the forwards, in tokens a layer; and in an evaluation less."""
    most = {"training": 0, "evaluation": 0}
    now = "training"

    def add(self: KeyValues, *given: Any) -> None:
        kept(self, *given)
        here = sum(held.tensor.shape[1] for held in (*self.keys.values(), *self.values.values()))
        most[now] = max(most[now], here)

    kept = KeyValues.add
    monkeypatch.setattr(KeyValues, "add", add)
    for window, training, evaluation in (
        (0, 128, 128),
        (9, 2 * 5 * 8, 2 * 2 * 8),
        (4, 2 * 5 * 3, 2 * 2 * 3),
        (1, 0, 0),
    ):
        most.update(training=0, evaluation=0)
        shape = ModelShape(layers=1, hidden=16, heads=2, ffn=16, vocabulary=16, window=window)
        schedule = build_schedule("seq1f1b", ranks=1, layers=1, microbatches=1, segments=5)
        pipeline = Pipeline(Decoder(shape), schedule, recompute="full", segment_lengths=(12, 12, 12, 12, 16))
        now = "training"
        pipeline.step(*batch(shape, 1, 64))
        now = "evaluation"
        pipeline.evaluate(*batch(shape, 1, 64))
        assert most == {"training": training, "evaluation": evaluation}, window


def test_what_is_not_seen_is_not_attended_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements of scores in all kernel calls of a step, in segments: those of the window, not of the sequence."""
    found: list[int] = []
    for name in ("attention_forward", "attention_backward"):
        kernel = getattr(merging, name)

        def counted(*given: Any, _kernel: Any = kernel, _at: int = "backward" in name) -> Any:
            q, k = given[_at], given[_at + 1]
            found.append(q.shape[2] * k.shape[2])
            return _kernel(*given)

        monkeypatch.setattr(merging, name, counted)
    shape = ModelShape(layers=1, hidden=16, heads=2, ffn=16, vocabulary=16, window=8)
    for segments in (1, 4):
        found.clear()
        schedule = build_schedule("1f1b" if segments == 1 else "seq1f1b", ranks=1, layers=1, microbatches=1,
                                  **({"segments": segments} if segments > 1 else {}))  # fmt: skip
        pipeline = Pipeline(Decoder(shape), schedule, recompute="none", segment_lengths=(256 // segments,) * segments)
        pipeline.step(*batch(shape, 1, 256))
        assert sum(found) <= 2 * 2 * 256 * 8  # twice, since a causal square is half masked; forward and backward
