"""Which links the groups of a mesh use, from how ranks are numbered."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from helixpipe.errors import ConfigError
from helixpipe.mesh import MeshShape
from helixpipe.parts.part import Part
from helixpipe.parts.shapes import SHAPES
from helixpipe.parts.work import Keeping
from helixpipe.predict.estimate import Setting, estimate_family
from helixpipe.predict.hardware import Link, named_accelerator, named_link
from helixpipe.predict.nodes import Nodes

INSIDE, ACROSS = Link("inside", 1e11, 1e-6, "made up"), Link("across", 1e10, 1e-5, "made up")
NODES = Nodes(8, INSIDE, ACROSS)
SETTING = Setting(SHAPES["7b"], 32768, named_accelerator("h100"), ACROSS, Keeping("none", 2))


def crosses(mesh: MeshShape, axes: str) -> bool:
    """Whether any group along these axes has ranks of two nodes, by listing all ranks as `runtime.mesh` numbers them."""
    sizes = {"pp": mesh.pp, "dp": mesh.dp, "cp": mesh.cp, "tp": mesh.tp}
    groups: dict[tuple[int, ...], set[int]] = {}
    for rank, place in enumerate(itertools.product(*map(range, sizes.values()))):
        key = tuple(at for axis, at in zip(sizes, place, strict=True) if axis not in axes.split())
        groups.setdefault(key, set()).add(rank // 8)
    return any(len(nodes) > 1 for nodes in groups.values())


@pytest.mark.parametrize(
    "sizes", [s for s in itertools.product((1, 2, 3, 4, 8), repeat=4) if 8 <= s[0] * s[1] * s[2] * s[3] <= 64]
)
def test_a_group_that_leaves_a_node_is_found_by_counting(sizes: tuple[int, int, int, int]) -> None:
    mesh = MeshShape(*sizes)
    links = NODES.links(mesh)
    assert (links.tensor is ACROSS) == crosses(mesh, "tp")
    assert (links.context is ACROSS) == crosses(mesh, "cp")
    assert (links.pipeline is ACROSS) == crosses(mesh, "pp")
    assert (links.replicas.name == "across") == crosses(mesh, "dp cp")
    assert (links.copies.name == "across") == crosses(mesh, "dp cp tp")


def test_a_sum_has_as_many_ways_out_of_a_node_as_members_there() -> None:
    links = NODES.links(MeshShape(1, 2, 8, 4))  # 16 replicas, two in each node
    assert links.replicas.bytes_per_s == 2 * ACROSS.bytes_per_s
    assert links.copies.bytes_per_s == 8 * ACROSS.bytes_per_s
    many = replace(NODES, across=replace(ACROSS, bytes_per_s=5e10)).links(MeshShape(1, 2, 8, 4))
    assert many.copies.bytes_per_s == INSIDE.bytes_per_s  # no faster than inside


def test_messages_of_pipeline_ranks_in_one_node_stay_there() -> None:
    placed = replace(SETTING, tensor_parallel=4).on_nodes(NODES, 4)
    assert [placed.link_between(r, r + 1).name for r in range(3)] == ["inside", "across", "inside"]
    found = estimate_family(placed, "1f1b", 4, 4)
    first = {(m.src, m.dst): found.message_seconds(m) for m in found.program.messages}
    assert first[1, 2] > 5 * first[0, 1]
    assert SETTING.link_between(0, 1) is ACROSS


def test_a_ring_is_priced_by_the_link_it_uses() -> None:
    inside, across = (
        replace(SETTING, context_parallel=8, tensor_parallel=tp, sequence_length=32768).on_nodes(NODES, 1)
        for tp in (1, 2)
    )
    assert inside.links is not None
    assert across.links is not None
    assert (inside.links.context, across.links.context) == (INSIDE, ACROSS)
    slow = replace(NODES, across=replace(ACROSS, bytes_per_s=1e8))
    attn = Part("attn", 0)
    assert replace(across, nodes=slow).costs.forward_s(attn, across.whole, 0) > across.costs.forward_s(
        attn, across.whole, 0
    )
    assert replace(inside, nodes=slow).costs.forward_s(attn, inside.whole, 0) == inside.costs.forward_s(
        attn, inside.whole, 0
    )


def test_ulysses_pays_for_two_exchanges_that_nothing_hides() -> None:
    """(2 h + 2 h_kv) b s (N-1) / N^2 elements forward, as the docstring of `ulysses_attention` says; backward as many."""
    shape = SHAPES["llama3-8b"]
    setting = replace(SETTING, shape=shape, context_parallel=4, link=ACROSS)
    free = replace(setting, link=named_link("free"))
    ulysses, alone = (replace(s, context_method="ulysses").costs for s in (setting, free))
    elements = (2 * shape.q_size + 2 * shape.kv_size) * 32768 * 3 / 16
    for name in ("forward_s", "input_s"):
        more = getattr(ulysses, name)(Part("attn", 0), setting.whole, 0) - getattr(alone, name)(
            Part("attn", 0), setting.whole, 0
        )
        assert more == pytest.approx(2 * elements / 1e10 + 2e-5)
    repeated = replace(setting, context_parallel=32, context_method="ulysses").costs
    assert repeated.forward_s(Part("attn", 0), setting.whole, 0) > 0


def test_a_node_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^per_node: 0; give at least 1$"):
        Nodes(0, INSIDE, ACROSS)


def test_the_machines_name_the_kernel_that_training_calls() -> None:
    h100 = named_accelerator("h100")
    assert str(h100.attention) == (
        "FlashAttention 2 0.34 of the peak forward and 0.33 backward (arXiv 2407.08608, figures 5 and 6)"
    )
    assert all(kernel.forward > h100.attention.forward for kernel in h100.other_attention)
