"""Replay: digests of what the library derives, so that a refactor can show that it changed nothing.

    program   every instruction of every rank, with the shapes that travel
    seconds   start and end of every predicted action, when the last gradient is home, the reduction
    bytes     predicted bytes of every rank over time, and those that stand

`python tests/replay/replay.py` writes them anew. A commit that does so says which numbers changed, and why.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from helixpipe.parts.part import Part, chain
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.shapes import SHAPES
from helixpipe.parts.work import Batch, Keeping
from helixpipe.predict.cost import Analytic
from helixpipe.predict.estimate import Estimate, Setting, estimate_family
from helixpipe.predict.hardware import named_accelerator, named_link
from helixpipe.predict.plan import plan
from helixpipe.predict.profile import CURVES, PASSES, Profile, Timing
from helixpipe.schedule.families import FAMILIES, options

FILE = Path(__file__).with_name("digests.json")

LLAMA = ModelShape(layers=8, hidden=256, heads=8, kv_heads=2, ffn=704, vocabulary=1000, norm_eps=1e-6)
GPT = ModelShape(
    layers=8, hidden=256, heads=8, ffn=1024, vocabulary=1000, mlp="gelu", norm="layer", positions="learned",
    context=8192, qkv_bias=True, bias=True, tied=True,
)  # fmt: skip
QWEN = replace(LLAMA, qk_norm=True, qkv_bias=True, head_dim=48, tied=True)
BOTH_WAYS = replace(LLAMA, causal=False, mlp="gelu")
RECOMPUTE = ("none", "full", "selective")
GRIDS: dict[str, tuple[Any, ...]] = {
    "segments": (4, 2), "stages_per_rank": (2,), "folds": (2, 1), "travel": ("none", "qkv", "attention"),
    "groups": ("sequential", "forward_first"),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A family's schedule under a setting."""

    family: str
    setting: Setting
    ranks: int
    microbatches: int
    options: dict[str, Any] = field(default_factory=dict)

    def estimate(self) -> Estimate:
        return estimate_family(self.setting, self.family, self.ranks, self.microbatches, **self.options)


def settings() -> Iterator[tuple[str, Setting]]:
    """Models, policies, precisions, meshes and costs, by name."""
    h100, nvlink, infiniband = named_accelerator("h100"), named_link("nvlink"), named_link("infiniband")
    for recompute, chunk in itertools.product(RECOMPUTE, (0, 256)):
        yield (
            f"llama {recompute} chunk {chunk}",
            Setting(LLAMA, 4096, h100, infiniband, Keeping(recompute, 2, chunk, chunk, "cuda")),
        )
        yield f"gpt {recompute} chunk {chunk}", Setting(GPT, 2048, keeping=Keeping(recompute, 4, chunk, chunk))
    keeping = Keeping("selective", 2, device="cuda")
    yield "qwen, two sequences", Setting(QWEN, 4096, keeping=Keeping("none", 8, 512), microbatch_size=2)
    yield "both ways", Setting(BOTH_WAYS, 4096, h100, infiniband, keeping)
    many = {"tensor_parallel": 2, "tensor_link": nvlink, "context_parallel": 2, "data_parallel": 2}
    yield (
        "mesh",
        Setting(LLAMA, 4096, h100, infiniband, replace(keeping, recompute="none"), **many, optimizer="sharded"),
    )
    yield (
        "megatron",
        Setting(GPT, 4096, h100, infiniband, replace(keeping, keeps_activated=True), **many, megatron=True),
    )
    yield "profile", Setting(GPT, 4096, profile=made_up(GPT), keeping=Keeping("selective", 4))


def made_up(shape: ModelShape) -> Profile:
    """A profile whose seconds are a rule of ours."""
    timings = tuple(
        Timing(kind, PASSES[name], length, context, 1e-6 * (3 + 7 * i) * (length + length * (length + context) / 1e4))
        for i, (kind, name) in enumerate(CURVES)
        for length, context in ((256, 0), (512, 0), (1024, 0), (256, 256), (256, 512))
    )
    return Profile(shape, "none", "float32", 1, 1, "0", timings)


def cases() -> Iterator[tuple[str, Case]]:
    """Every family: all its options under one setting, and all settings under one option."""
    known = list(settings())
    for family in FAMILIES:
        grid = {name: GRIDS[name] for name in options(family) if name in GRIDS}
        for i, values in enumerate(itertools.product(*grid.values())):
            given = dict(zip(grid, values, strict=True))
            for j, (name, setting) in enumerate(known):
                if i and (i + j) % 7:  # beyond the first options, a setting in seven
                    continue
                if not setting.shape.causal and given.get("segments", 1) > 1:
                    continue
                for ranks, microbatches in ((4, 8), (3, 4)) if family != "dualpipe_v" else ((4, 8),):
                    if ranks == 3 and j % 3:
                        continue
                    told = " ".join(f"{key}={value}" for key, value in given.items())
                    yield (
                        f"{family} p{ranks} m{microbatches} {told} | {name}",
                        Case(family, setting, ranks, microbatches, given),
                    )
    opaque = {"opaque": (1, 2, 5)}
    for recompute in RECOMPUTE:
        setting = Setting(LLAMA, 2048, keeping=Keeping(recompute, 4))
        for family in ("1f1b", "zb_h1"):
            yield f"{family} p4 m8 opaque | llama {recompute}", Case(family, setting, 4, 8, opaque)


def texts(found: Estimate) -> dict[str, str]:
    """What a digest is made of."""
    program, timeline = found.program, found.timeline
    lines = [f"{m.number} {m.kind} {m} {m.shapes}" for m in program.messages]
    lines += [f"{rank} {type(i).__name__} {i} {[m.number for m in getattr(i, 'waits', ())]}"
              for rank, order in enumerate(program.ranks) for i in order]  # fmt: skip
    spans = [f"{s.action} {s.start_s:.12g} {s.end_s:.12g}" for order in timeline.spans for s in order]
    times = [f"{found.step_s:.12g} {found.reduction_s:.12g} {found.ideal_s:.12g}", *spans]
    held = [f"{p.time_s:.12g} {p[1:]}" for points in timeline.memory for p in points]
    return {
        "program": "\n".join(lines), "seconds": "\n".join(times), "bytes": "\n".join([*held, str(timeline.standing)])
    }  # fmt: skip


NAMED = ("tiny", "1.3b", "3b", "7b", "13b", "gpt2", "llama3-8b", "qwen2.5-7b")


def parts() -> Iterator[tuple[str, str]]:
    """What each part says of itself, in named shapes."""
    for name in NAMED:
        shape = SHAPES[name]
        for batch in (Batch(2, (512,)), Batch(1, (300, 200, 12))):
            rows = []
            for part in (*chain(1), Part("block", 0)):
                costs = Analytic(shape, named_accelerator("h100"), 2)
                for seg in range(len(batch.segment_lengths)):
                    prices = [getattr(costs, each)(part, batch, seg) for each in ("forward_s", "input_s", "weight_s")]
                    sizes = [shape.value_shape(v, batch, seg) for v in (*part.reads, *part.makes) if v.name != "loss"]
                    rows.append(f"{part} {seg} {[f'{p:.12g}' for p in prices]} {sizes} {shape.parameters(part)}")
            yield f"parts of {name}, {batch.segment_lengths}", "\n".join(rows)


def digests() -> dict[str, dict[str, str]]:
    """Case -> what -> digest."""
    found = {name: {"parts": _digest(text)} for name, text in parts()}
    for name, case in cases():
        found[name] = {what: _digest(text) for what, text in texts(case.estimate()).items()}
    setting = Setting(LLAMA, 8192, named_accelerator("h100"), named_link("infiniband"), tensor_parallel=2)
    chosen = plan(setting, 4, 8, 80e9, only=("1f1b", "helix", "zb_v", "seq1f1b"))
    found["plan"] = {
        "choices": _digest("\n".join(f"{c.candidate} {c.makespan_s:.12g} {c.peak_bytes}" for c in chosen.fits))
    }
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def renew() -> None:
    """Write the golden file."""
    rows = [f"  {json.dumps(name)}: {json.dumps(each)}" for name, each in digests().items()]
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    print(f"{len(rows)} cases")


if __name__ == "__main__":
    renew()
