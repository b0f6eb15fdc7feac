"""Sizes of a mesh: what divides, and every refusal with what would work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helixpipe.errors import ConfigError
from helixpipe.mesh import MeshShape
from helixpipe.parts.shape import ModelShape

SHAPE = ModelShape(layers=2, hidden=32, heads=8, kv_heads=4, ffn=12, vocabulary=16)


def test_sizes_and_units() -> None:
    mesh = MeshShape(2, 3, 4, 1)
    assert (mesh.size, str(mesh), mesh.unit) == (24, "pp 2 x dp 3 x cp 4", 8)
    assert (MeshShape().size, str(MeshShape()), MeshShape().unit) == (1, "pp 1", 1)
    assert MeshShape(cp=4, layout="striped").unit == 4
    assert MeshShape(cp=4, context_method="ulysses").unit == 4
    assert MeshShape(cp=2, tp=3).unit == 12
    assert MeshShape(tp=4).unit == 4


@pytest.mark.parametrize(
    "mesh", [MeshShape(cp=4, tp=2), MeshShape(cp=4, tp=2, context_method="ulysses"), MeshShape(tp=4)]
)
def test_what_divides_is_taken(mesh: MeshShape) -> None:
    mesh.check(SHAPE, (16, 8))
    mesh.check(SHAPE, ())


@pytest.mark.parametrize(
    ("mesh", "lengths", "message"),
    [
        (MeshShape(tp=8), (16,), "mesh.tp: 8 ranks do not divide model.kv_heads 4; tp may be 1, 2 or 4"),
        (MeshShape(tp=3), (16,), "mesh.tp: 3 ranks do not divide model.heads 8; tp may be 1, 2 or 4"),
        (
            MeshShape(cp=3, context_method="ulysses"),
            (18,),
            "mesh.context_method: ulysses divides the heads of a rank, 8, over cp 3; cp may be 1, 2, 4 or 8, or use ring",
        ),
        (
            MeshShape(cp=4, tp=4, context_method="ulysses"),
            (16,),
            "mesh.context_method: ulysses divides the heads of a rank, 2, over cp 4; cp may be 1 or 2, or use ring",
        ),
        (
            MeshShape(cp=4),
            (20,),
            "train.sequence_length: 20 tokens do not divide for ring over cp 4, tp 1, whose zigzag layout needs a multiple "
            "of 8; use 16 or 24",
        ),
        (
            MeshShape(tp=4),
            (3,),
            "train.sequence_length: 3 tokens do not divide for tp 4, whose mesh needs a multiple of 4; use 4",
        ),
        (
            MeshShape(cp=2),
            (10, 6),
            "schedule.segment_multiple: segments of 10, 6 tokens do not divide for ring over cp 2, tp 1, whose zigzag "
            "layout needs multiples of 4; set it to 4 or a multiple of that",
        ),
    ],
)
def test_what_does_not_divide_is_one_line(mesh: MeshShape, lengths: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        mesh.check(SHAPE, lengths)
    assert str(caught.value) == message


def test_norms_over_all_heads_are_not_divided() -> None:
    shape = replace(SHAPE, qk_norm=True, qk_norm_over="width")
    MeshShape(cp=4).check(shape, (16,))
    with pytest.raises(ConfigError) as caught:
        MeshShape(tp=2).check(shape, (16,))
    assert str(caught.value) == (
        "mesh.tp: 2 ranks divide the heads, and model.qk_norm_over 'width' needs all of them together; use tp 1"
    )


def test_sizes_and_names_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"^mesh\.dp: 0; give at least 1$"):
        MeshShape(dp=0)
    with pytest.raises(ConfigError, match=r"^mesh\.context_method: 'star' is not known; known: ring, ulysses$"):
        MeshShape(context_method="star")
    with pytest.raises(ConfigError, match=r"^mesh\.layout: 'spiral' is not known; known: zigzag, striped, plain$"):
        MeshShape(layout="spiral")


def test_as_many_ranks_must_run_as_the_mesh_has() -> None:
    MeshShape(2, 2).check_ranks(4)
    with pytest.raises(ConfigError) as caught:
        MeshShape(2, 2).check_ranks(6)
    assert str(caught.value) == (
        "mesh: pp 2 x dp 2 are 4 ranks, and torchrun started 6 processes; start 4, or choose schedule.ranks, mesh.dp, "
        "mesh.cp and mesh.tp that multiply to 6"
    )
