"""Which tokens each rank holds, and what is said of lengths, layouts and documents that cannot be."""

from __future__ import annotations

import pytest
import torch

from helixpipe.errors import ConfigError
from helixpipe.sequence import Documents, Layout, SequenceMesh, linformer_attention, ring_attention, shard_batch


def test_who_holds_what() -> None:
    def holders(kind: str, ring: int, heads: int = 1) -> str:
        layout = Layout(kind, 16, ring, heads)
        held = ["?"] * 16
        for rank in range(layout.ranks):
            for position in layout.positions(rank).tolist():
                held[position] = str(rank)
        return "".join(held)

    assert holders("plain", 4) == "0000111122223333"
    assert holders("zigzag", 4) == "0011223333221100"
    assert holders("striped", 4) == "0123012301230123"
    assert holders("zigzag", 2, 2) == "0000222233331111"
    assert holders("striped", 2, 2) == "0202020213131313"
    assert holders("zigzag", 1) == "0" * 16
    assert Layout("zigzag", 5, 1).positions(0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("zigzags", 16, 4), "sequence.layout: 'zigzags' is not known; did you mean 'zigzag'?"),
        (
            ("zigzag", 20, 4),
            "sequence.length: 20 tokens do not divide over 4 ranks in the zigzag layout, which needs a multiple of 8; "
            "use 16 or 24",
        ),
        (
            ("plain", 3, 4),
            "sequence.length: 3 tokens do not divide over 4 ranks in the plain layout, which needs a multiple of 4; use 4",
        ),
        (
            ("striped", 10, 2, 2),
            "sequence.length: 10 tokens do not divide over 4 ranks in the striped layout, which needs a multiple of 4; "
            "use 8 or 12",
        ),
    ],
)
def test_layouts_that_cannot_be(given: tuple[str, int, int], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Layout(*given)
    assert str(error.value) == message


def test_documents_that_cannot_be() -> None:
    for ends in ((0, 5, 12), (3, 16), (0, 9, 9, 16), (0,), (0, 20, 16)):
        with pytest.raises(
            ConfigError, match=r"cumulative lengths must rise from 0 to 16, the whole sequence, and are"
        ):
            Documents.of(ends, 16, 1)
    with pytest.raises(ConfigError, match=r"ids of shape \[2, 8\] for 2 whole sequences of 16 tokens; give \[2, 16\]"):
        Documents.of(torch.zeros(2, 8, dtype=torch.int64), 16, 2)
    with pytest.raises(ConfigError, match=r"made for 8 tokens, and the whole sequence has 16; describe the whole"):
        Documents.of(Documents.of((0, 8), 8, 1), 16, 1)
    with pytest.raises(ConfigError, match=r"made for 3 sequences, and there are 2 here"):
        Documents.of(Documents.of(torch.arange(3).unsqueeze(1).expand(3, 8), 8, 3), 8, 2)


def test_documents_are_a_value() -> None:
    ids = torch.tensor([[0, 0, 7, 7], [0, 0, 7, 7], [1, 1, 1, 2]])
    documents = Documents.of(ids, 4, 3)
    assert [(row.first, row.stop, len(row.spans)) for row in documents.rows] == [(0, 2, 2), (2, 3, 2)]
    assert documents == Documents.of(ids.clone(), 4, 3)
    assert Documents.of(documents, 4, 3) is documents
    assert Documents.of(torch.tensor([0, 1, 4]), 4, 1) == Documents.of((0, 1, 4), 4, 1)


def test_shapes_that_cannot_be() -> None:
    q, k = torch.zeros(1, 8, 4, 2), torch.zeros(1, 8, 3, 2)
    with pytest.raises(ConfigError, match=r"^sequence.kv_heads: 3 do not divide 4 heads; use 1, 2 or 4$"):
        ring_attention(q, k, k)
    with pytest.raises(
        ConfigError, match=r"q \[1, 8, 4, 2\], k \[1, 4, 4, 2\], v \[1, 4, 4, 2\]; give q \[b, s, heads, d\]"
    ):
        ring_attention(q, q[:, :4], q[:, :4])
    with pytest.raises(
        ConfigError, match=r"project_v: \[3, 7\] for 8 tokens a rank; give this rank's columns, \[p, 8\]"
    ):
        linformer_attention(q, q, q, torch.zeros(3, 8), torch.zeros(3, 7))


def test_meshes_that_cannot_be() -> None:
    with pytest.raises(ConfigError) as error:
        SequenceMesh(rings=(2, 2), heads=2)
    assert str(error.value) == (
        "sequence.mesh: rings of 2 x 2 times 2 ranks over heads are not the 1 ranks of the group; "
        "rings x heads may be 1 x 1"
    )


def test_targets_are_shifted_before_the_cut_and_documents_end() -> None:
    tokens = torch.arange(8).unsqueeze(0) + 10
    found = shard_batch(tokens, documents=(0, 3, 8))
    assert found.tokens.tolist() == tokens.tolist()
    assert found.targets.tolist() == [[11, 12, -100, 14, 15, 16, 17, -100]]
    assert found.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
