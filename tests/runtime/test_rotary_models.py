"""Models whose positions are stretched, beyond the length that they were made for: transformers' own, in float64.

Its rotary tables and norms are float32 whatever the model's precision, so as it is it agrees to float32's last bits
(5e-6 of a gradient's norm), and where each float32 it asks for is float64 (`Wide`) as plain autograd does, to 1e-9.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import batch
from ranks import Ranks, mesh_of
from test_mesh import Found, assembled, device_mesh, sized
from test_transformers import EXACT, FLOAT32, Named, Truth, equal, hugging_face, ours, with_random_values
from values import Given
from wide import Wide

import helixpipe as hp
from helixpipe.parts.rotary import TYPES, Rotary

BASE: dict[str, Any] = {
    "layers": 3, "hidden": 16, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 24, "vocabulary": 19, "rope_base": 50.0,
}  # fmt: skip
LENGTH = 24
SHORT, LONG = (1.0, 1.25, 1.5, 2.0), (1.5, 3.0, 6.0, 8.0)
ROTARIES = {
    "default": Rotary(),
    "linear": Rotary("linear", factor=3.0),
    "dynamic": Rotary("dynamic", factor=2.0, original=8),
    "yarn": Rotary("yarn", factor=4.0, original=8, beta_fast=1.0, beta_slow=0.1, mscale=0.7, mscale_all_dim=1.0),
    "llama3": Rotary("llama3", factor=4.0, original=8, low_freq_factor=0.1, high_freq_factor=1.0),
    "longrope": Rotary("longrope", factor=3.0, original=20, short_factor=SHORT, long_factor=LONG),
}
# half of each head is rotated; its config knows no head size but hidden / heads
PHI = {
    "phi3": Rotary(),
    "phi3-short": Rotary("longrope", factor=4.0, original=24, short_factor=SHORT[:2], long_factor=LONG[:2]),
    "phi3-long": Rotary("longrope", factor=4.0, original=23, short_factor=SHORT[:2], long_factor=LONG[:2]),
}
MODELS = {name: hp.ModelShape(**BASE, rope=rotary) for name, rotary in ROTARIES.items()} | {
    name: hp.ModelShape(**BASE | {"hidden": 32}, rope=rotary, rotary_share=0.5) for name, rotary in PHI.items()
}


def transformer(name: str) -> Any:
    """Its own model in float64, with random values."""
    transformers, shape = hugging_face(), MODELS[name]
    rotary = shape.rope
    names = {"original": "original_max_position_embeddings"}
    keys = {names.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in rotary.given.items()}
    longest = 64
    if rotary.type == "dynamic":
        longest = keys.pop("original_max_position_embeddings")
    more: dict[str, Any] = {}
    if name.startswith("phi3"):
        more = {"partial_rotary_factor": 0.5, "pad_token_id": None}
        if rotary.type == "longrope":
            more["original_max_position_embeddings"] = rotary.original
    kind = transformers.Phi3Config if name.startswith("phi3") else transformers.LlamaConfig
    config = kind(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        intermediate_size=shape.ffn, rms_norm_eps=shape.norm_eps, max_position_embeddings=longest,
        rope_parameters={"rope_type": rotary.type, "rope_theta": shape.rope_base, **keys}, bos_token_id=None,
        eos_token_id=None, **more,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64)
    return with_random_values(model, 0.3)


def under_our_names(shape: hp.ModelShape, theirs: Named) -> Named:
    """Phi-3's q, k and v are one matrix, and so are gate and up."""
    apart: Named = {}
    for name, tensor in theirs.items():
        if "qkv_proj" in name:
            pieces = tensor.split([shape.q_size, shape.kv_size, shape.kv_size])
            apart |= {name.replace("qkv_proj", f"{each}_proj"): t for each, t in zip("qkv", pieces, strict=True)}
        elif "gate_up_proj" in name:
            pieces = tensor.chunk(2)
            apart |= {
                name.replace("gate_up_proj", f"{each}_proj"): t for each, t in zip(("gate", "up"), pieces, strict=True)
            }
        else:
            apart[name] = tensor
    return ours("llama", apart)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@functools.cache
def truth(name: str, sequences: int, wide: bool = True) -> Truth:
    hugging_face()
    shape = MODELS[name]
    tokens, targets = batch(shape, sequences, LENGTH)
    with Wide() if wide else nullcontext():
        model = transformer(name)
        with default_dtype(torch.float64 if wide else torch.float32):  # of a length, a tensor of int64, times a factor
            logits = model(input_ids=tokens, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
    parameters = dict(model.named_parameters())
    values, gradients = {n: p.detach() for n, p in parameters.items()}, {n: p.grad for n, p in parameters.items()}
    return Truth(float(loss.detach()), under_our_names(shape, values), under_our_names(shape, gradients))


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    mesh: tuple[tuple[str, int], ...]
    options: dict[str, Any] = field(default_factory=dict)
    recompute: str = "selective"
    lengths: tuple[int, ...] | None = None
    method: str = "ring"
    layout: str = "zigzag"

    def __str__(self) -> str:
        mesh = "x".join(f"{name}{size}" for name, size in self.mesh)
        return f"{self.name}-{self.family}-{mesh}-{self.method}-{self.layout}"


SEGMENTS = {"options": {"segments": 3}, "lengths": (12, 4, 8)}
TWO_FOLD = {"options": {"folds": 1, "travel": "qkv"}}


def cases() -> list[Case]:
    """All models under a family of each kind; where the length matters also over ranks that share a sequence."""
    found = []
    for i, name in enumerate(MODELS):
        found.append(Case(name, "1f1b", sized(pp=1 + i % 2)))
        found.append(Case(name, "seq1f1b", sized(pp=2 - i % 2), recompute=("none", "full")[i % 2], **SEGMENTS))
        found.append(Case(name, "helix", sized(pp=2), **TWO_FOLD))
    for i, name in enumerate(("dynamic", "longrope", "phi3-short", "phi3-long")):
        layout = ("zigzag", "striped")[i % 2]
        found.append(Case(name, "seq1f1b", sized(pp=2, cp=2), layout=layout, **SEGMENTS))
        found.append(Case(name, "seq1f1b", sized(pp=2, tp=2), **SEGMENTS))
        found.append(Case(name, "1f1b", sized(cp=2, tp=2), method=("ulysses", "ring")[i % 2]))
    return found


def run_case(case: Case, values: bytes) -> Found | None:
    """On a rank of the four: what it has after a step between steps of other lengths."""
    ranks = dict(case.mesh).get("pp", 1)
    mesh = mesh_of(ranks) if len(case.mesh) == 1 else device_mesh(case.mesh)
    if mesh is None:
        return None
    shape = MODELS[case.name]
    schedule = hp.build_schedule(case.family, ranks=ranks, layers=shape.layers, microbatches=2, **case.options)
    model = Given(shape, pickle.loads(values))
    pipeline, other = (
        hp.Pipeline(
            model, schedule, mesh, dtype=torch.float64, recompute=case.recompute, timeout_s=30, segment_lengths=lengths,
            context_method=case.method, layout=case.layout,
        )
        for lengths in (case.lengths, (4, 4, 4) if case.lengths else None)
    )  # fmt: skip
    data = batch(shape, 2, LENGTH)
    other.step(*batch(shape, 2, 12))  # another pipeline of the same model, whose sequences are shorter
    loss = pipeline.step(*data)
    other.step(*batch(shape, 2, 12))
    evaluated = pipeline.evaluate(*data)
    gradients = {name: p.grad.clone() for name, p in pipeline.parameters.items() if p.grad is not None}
    cuts = pipeline._tensor.cuts if pipeline._tensor else {}
    for each in (pipeline, other):
        each.close()
    return Found(pipeline.mesh.here, loss, evaluated, 0.0, gradients, cuts)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_pipelines_equal_transformers(four_ranks: Ranks, case: Case) -> None:
    expected = truth(case.name, 2)
    results = [each for each in four_ranks.run(run_case, case, pickle.dumps(expected.values)) if each is not None]
    for result in results:
        assert abs(result.evaluated - expected.loss) < EXACT[0]
        equal(expected, result.loss, assembled(results))


@pytest.mark.parametrize("name", MODELS)
def test_as_it_is_transformers_agrees_to_float32(name: str) -> None:
    """Tables and norms of float32 are the whole difference."""
    expected = truth(name, 2, wide=False)
    shape = MODELS[name]
    schedule = hp.build_schedule("1f1b", ranks=1, layers=3, microbatches=2)
    pipeline = hp.Pipeline(Given(shape, expected.values), schedule, dtype=torch.float64)
    loss = pipeline.step(*batch(shape, 2, LENGTH))
    equal(expected, loss, {name: p.grad for name, p in pipeline.parameters.items() if p.grad is not None}, FLOAT32)
    pipeline.close()


def test_the_scalings_differ_enough_to_be_told_apart() -> None:
    """No case would pass with another's frequencies; all types are there."""
    assert {shape.rope.type for shape in MODELS.values()} == set(TYPES)
    losses = [truth(name, 2).loss for name in MODELS]
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 1e3 * FLOAT32[0]
    for name in ("dynamic", "longrope", "phi3-short", "phi3-long"):
        of = MODELS[name]
        lengths = {of.rope.frequencies(of.rotated, of.rope_base, n) for n in (12, LENGTH)}
        assert len(lengths) == (1 if name == "phi3-short" else 2)
