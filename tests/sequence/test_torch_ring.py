"""Ring attention against torch's own ring, a private template: skipped, loudly, where it is gone."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from oracle_attention import Case, largest_difference, mesh_for, spread, worst
from ranks import Ranks
from torch import Tensor

from helixpipe.sequence import gather, shard

TEMPLATE = "torch.distributed.tensor.experimental._context_parallel._attention"
aten = torch.ops.aten


def template() -> Any:
    try:
        module = import_module(TEMPLATE)
        return module if module._templated_ring_attention and module._templated_ring_attention_backward else None
    except (ImportError, AttributeError):
        return None


def torchs(case: Case) -> list[Tensor] | None:
    """What `spread` gives, by torch's template on the CPU kernel. It takes [b, heads, s, d] and repeated K,V heads."""
    mesh, ring = mesh_for(case.rings, 1), template()
    if mesh is None:
        return None
    ring._cp_options.enable_load_balance = case.causal  # zigzag; refused without causality
    q, k, v, grad = (shard(t.to(case.dtype), mesh, case.layout).transpose(1, 2) for t in case.inputs())
    out, lse = ring._templated_ring_attention(
        mesh.group, 2, aten._scaled_dot_product_flash_attention_for_cpu, q, k, v, is_causal=case.causal
    )
    gradients = ring._templated_ring_attention_backward(
        mesh.group, 2, aten._scaled_dot_product_flash_attention_for_cpu_backward.default, grad, "grad_out",
        q, k, v, out, lse, is_causal=case.causal, dropout_p=0.0,
    )  # fmt: skip
    return [gather(t.transpose(1, 2), mesh, case.layout) for t in (out, *gradients[:3])]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("causal", "layout"), [(True, "zigzag"), (False, "plain")])
def test_equals_torchs_ring(four_ranks: Ranks, ranks: int, causal: bool, layout: str) -> None:
    if template() is None:
        pytest.skip(
            f"torch {torch.__version__} no longer has {TEMPLATE}._templated_ring_attention: this oracle is gone"
        )
    case = Case(rings=(ranks,), causal=causal, layout=layout, length=48, dtype=torch.float32)
    theirs = four_ranks.run(torchs, case)
    for mine, reference in zip(four_ranks.run(spread, case)[:ranks], theirs[:ranks], strict=True):
        assert worst(mine, [t.double() for t in reference], largest_difference) < 5e-6
