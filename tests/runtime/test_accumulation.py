"""Several steps before one update: with `counted` they add up to one step of all their sequences. And batches without a
target that counts."""

from __future__ import annotations

import inspect
import re
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import batch, plain_step
from ranks import Ranks
from test_mesh import FAMILIES, Found, assembled, device_mesh, sized
from torch import Tensor

import helixpipe as hp
from helixpipe.model.decoder import Decoder
from helixpipe.parts.shape import ModelShape
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule

SHAPE = ModelShape(layers=3, hidden=16, heads=4, ffn=24, vocabulary=19, tied=True, kv_heads=2)
LENGTH = 24
STEPS, MICROBATCHES = 3, 2


@dataclass(frozen=True)
class Case:
    mesh: tuple[tuple[str, int], ...]
    family: str = "1f1b"
    chunk: int = 0

    @property
    def sequences(self) -> int:
        """Of one step."""
        return MICROBATCHES * dict(self.mesh).get("dp", 1)

    def __str__(self) -> str:
        return f"{'x'.join(f'{name}{size}' for name, size in self.mesh)}-{self.family}-chunk{self.chunk}"

    def pipeline(self) -> Pipeline:
        ranks, options = dict(self.mesh).get("pp", 1), FAMILIES[self.family]
        schedule = build_schedule(self.family, ranks=ranks, layers=3, microbatches=MICROBATCHES, **options)
        return Pipeline(
            Decoder(SHAPE, mlp_chunk=self.chunk, head_chunk=self.chunk), schedule,
            device_mesh(self.mesh) if self.mesh else None, dtype=torch.float64, timeout_s=30,
            segment_lengths=(12, 4, 8) if schedule.segments == 3 else None,
        )  # fmt: skip


def batches(sequences: int) -> list[tuple[Tensor, Tensor]]:
    """Of STEPS steps: their counts differ, those of their sequences too, and the second step's first counts nothing."""
    tokens, targets = batch(SHAPE, STEPS * sequences, LENGTH)
    generator = torch.Generator().manual_seed(5)
    kept = torch.rand(targets.shape, generator=generator) < torch.linspace(0.05, 1, len(targets)).unsqueeze(1)
    kept[sequences] = False
    targets[~kept] = -100
    return list(zip(tokens.split(sequences), targets.split(sequences), strict=True))


def joint(given: list[tuple[Tensor, Tensor]]) -> tuple[float, dict[str, Tensor]]:
    """Plain autograd's loss and gradients of all batches at once."""
    tokens, targets = (torch.cat(each) for each in zip(*given, strict=True))
    return plain_step(SHAPE, tokens, targets)


def accumulated(case: Case) -> Found:
    """On a rank."""
    pipeline, given = case.pipeline(), batches(case.sequences)
    whole = hp.counted(*(targets for _, targets in given))
    evaluated = sum(pipeline.evaluate(*each, counted=whole) for each in given)
    loss = sum(pipeline.step(*each, counted=whole) for each in given)
    gradients = {name: p.grad.clone() for name, p in pipeline.parameters.items() if p.grad is not None}
    cuts = pipeline._tensor.cuts if pipeline._tensor else {}
    pipeline.close()
    return Found(pipeline.mesh.here, loss, evaluated, 0.0, gradients, cuts)


def check_joint(case: Case, results: list[Found]) -> None:
    given = batches(case.sequences)
    counts = [hp.counted(targets) for _, targets in given]
    assert len(set(counts)) == STEPS, "the steps are to weigh differently"
    loss, gradients = joint(given)
    for result in results:
        assert abs(result.loss - loss) < 1e-12
        assert abs(result.evaluated - loss) < 1e-12
    found = assembled(results)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 1e-9, f"{name}: {error:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [0, 5])
def test_steps_add_up_to_one_step_on_one_rank(family: str, chunk: int) -> None:
    case = Case((), family, chunk)
    check_joint(case, [accumulated(case)])


@pytest.mark.parametrize(
    "case",
    [
        Case(sized(pp=2, dp=2)), Case(sized(pp=2, dp=2), "helix"), Case(sized(pp=2, cp=2), "seq1f1b"),
        Case(sized(pp=2, cp=2), "helix", 5), Case(sized(dp=2, cp=2)), Case(sized(pp=2, tp=2), "zb_h1"),
    ],
    ids=str,
)  # fmt: skip
def test_steps_add_up_to_one_step_on_four_ranks(four_ranks: Ranks, case: Case) -> None:
    check_joint(case, four_ranks.run(accumulated, case))


def test_without_counted_every_step_adds_a_mean_of_its_own() -> None:
    """What the docstring says of leaving it out: with 2 and 16 counted targets the means are not the joint mean."""
    tokens, targets = batch(SHAPE, 4, LENGTH)
    targets[:] = -100
    targets[0, :2] = 3
    targets[2, :16] = torch.arange(16)
    given = list(zip(tokens.split(2), targets.split(2), strict=True))
    assert [hp.counted(each) for _, each in given] == [2, 16]
    pipeline = Case(()).pipeline()
    losses = [pipeline.step(*each) for each in given]
    means = [plain_step(SHAPE, *each) for each in given]
    assert losses == pytest.approx([loss for loss, _ in means], abs=1e-12)
    for name, parameter in pipeline.parameters.items():
        assert parameter.grad is not None
        expected = means[0][1][name] + means[1][1][name]
        assert (parameter.grad - expected).norm() < 1e-9 * expected.norm()
    joint_loss, joint_gradients = joint(given)
    assert abs(joint_loss - (2 * losses[0] + 16 * losses[1]) / 18) < 1e-12
    head = pipeline.parameters["head.norm.weight"].grad
    assert head is not None
    assert head.norm() > 1.5 * joint_gradients["head.norm.weight"].norm()
    pipeline.close()


def test_the_guide_s_lines_do_it() -> None:
    guide = (Path(__file__).parents[2] / "docs/guide/README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"(?m)^    batches = .*\n(?:    .*\n)+", guide)
    given = batches(4)[:2]
    steps = {
        f"{name}_{i}": each[part] for i, each in enumerate(given) for part, name in enumerate(("tokens", "targets"))
    }
    found: dict[str, Any] = {"hp": hp, "pipeline": Case(()).pipeline(), **steps}
    exec(textwrap.dedent(block), found)
    assert abs(found["loss"] - joint(given)[0]) < 1e-12
    found["pipeline"].close()


def test_counted_is_of_all_tensors() -> None:
    targets = torch.tensor([[1, -100, 0], [-100, -100, 2]])
    assert (hp.counted(targets), hp.counted(targets, targets[:1]), hp.counted()) == (3, 5, 0)


@pytest.mark.parametrize("counted", [43, 0, -1])
def test_fewer_than_the_batch_has_are_refused(counted: int) -> None:
    pipeline, (tokens, targets) = Case(()).pipeline(), batch(SHAPE, 2, LENGTH)
    here = hp.counted(targets)
    assert here == 46
    for run in (pipeline.step, pipeline.evaluate):
        with pytest.raises(hp.ConfigError) as caught:
            run(tokens, targets, counted=counted)
        assert str(caught.value) == (
            f"counted: {counted}, and 46 targets of this batch alone count; "
            "give the number of all steps of the update together"
        )
    assert all(parameter.grad is None for parameter in pipeline.parameters.values())
    pipeline.step(tokens, targets, counted=torch.tensor(here))  # type: ignore[arg-type]  # what a sum in torch gives
    with pytest.raises(TypeError):
        pipeline.step(tokens, targets, counted=46.5)  # type: ignore[arg-type]
    pipeline.close()


SAID = "none of the 48 targets counts, all are -100: the loss of this batch is 0 and gradients get nothing"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [0, 5])
def test_a_batch_that_counts_nothing_warns_and_changes_nothing(family: str, chunk: int) -> None:
    pipeline, (tokens, targets) = Case((), family, chunk).pipeline(), batch(SHAPE, 2, LENGTH)
    nothing = torch.full_like(targets, -100)
    with pytest.warns(hp.UncountedWarning) as told:
        assert pipeline.step(tokens, nothing) == 0.0
    assert [str(each.message) for each in told] == [SAID]
    gradients = [parameter.grad for parameter in pipeline.parameters.values()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)  # NaN is any

    pipeline.step(tokens, targets)
    before = {name: p.grad.clone() for name, p in pipeline.parameters.items() if p.grad is not None}
    with pytest.warns(hp.UncountedWarning):
        pipeline.step(tokens, nothing)
    for name, gradient in before.items():
        assert torch.equal(gradient, pipeline.parameters[name].grad), name  # type: ignore[arg-type]
    pipeline.close()


def test_the_warning_is_python_s_once_per_line_that_calls() -> None:
    pipeline, (tokens, targets) = Case(()).pipeline(), batch(SHAPE, 2, LENGTH)
    nothing = torch.full_like(targets, -100)
    for run in (pipeline.step, pipeline.evaluate):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("default")
            for _ in range(3):
                assert run(tokens, nothing) == 0.0
                line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
        assert [(str(each.message), each.category) for each in told] == [(SAID, hp.UncountedWarning)]
        assert [(each.filename, each.lineno) for each in told] == [(__file__, line)]
    assert issubclass(hp.UncountedWarning, UserWarning)
    pipeline.close()


def test_one_of_several_steps_may_count_nothing() -> None:
    pipeline, (tokens, targets) = Case(()).pipeline(), batch(SHAPE, 2, LENGTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipeline.step(tokens, torch.full_like(targets, -100), counted=46) == 0.0
    pipeline.close()


def nothing_counts(case: Case) -> tuple[float, float, bool, int]:
    """On a rank."""
    pipeline, (tokens, targets) = case.pipeline(), batch(SHAPE, case.sequences, LENGTH)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loss = pipeline.step(tokens, torch.full_like(targets, -100))
        evaluated = pipeline.evaluate(tokens, torch.full_like(targets, -100))
    zero = all(p.grad is not None and not p.grad.any() for p in pipeline.parameters.values())
    pipeline.close()
    return loss, evaluated, zero, len(told)


def test_nothing_counts_on_four_ranks(four_ranks: Ranks) -> None:
    """Every rank warns: where a filter makes errors of warnings, none waits for another."""
    for case in (Case(sized(pp=2, dp=2)), Case(sized(pp=2, cp=2), "helix")):
        assert four_ranks.run(nothing_counts, case) == [(0.0, 0.0, True, 2)] * 4
