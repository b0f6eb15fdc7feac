"""qkv: three linear layers, norms of q and k where a model has them, and rotary positions; n to q, k, v."""

from __future__ import annotations

from helixpipe.parts.kind import Kept, Kind, Shapes, linear, register
from helixpipe.parts.norm import norm_backward, norm_forward, norm_parameters, norm_saved
from helixpipe.parts.part import Part
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Work


@register
class QKVKind(Kind):
    name = "qkv"
    reads = ("n",)
    beside = ("start",)
    makes = ("q", "k", "v")
    splits = True
    over_tokens = False
    units = 1

    def parameters(self, shape: ModelShape) -> Shapes:
        h, q, kv, bias = shape.hidden, shape.q_size, shape.kv_size, shape.qkv_bias
        sizes = {"q": q, "k": kv, "v": kv}
        found = {n: size for name, out in sizes.items() for n, size in linear(name, out, h, bias, shape.lora).items()}
        if shape.qk_norm:
            whole = shape.qk_norm_over == "width"
            found |= norm_parameters(shape, "q_norm.", q if whole else shape.head_dim)
            found |= norm_parameters(shape, "k_norm.", kv if whole else shape.head_dim)
        return found

    def value_shape(self, name: str, work: Work) -> tuple[int, ...]:
        heads = work.shape.heads if name == "q" else work.shape.kv_heads
        return (*work.lead, heads, work.shape.head_dim)

    def moved_elements(self, shape: ModelShape) -> float:
        """Whatever share of a head is rotated: the rest is copied beside it."""
        return 2.0 * (shape.q_size + 2 * shape.kv_size) if shape.positions == "rope" else 0.0

    @property
    def exchanges(self) -> int:
        return 1

    def saved(self, part: Part, work: Work) -> Kept:
        shape = work.shape
        (n,) = part.reads
        found = {work.gathered(n): work.value_bytes(n) * work.keeping.tensor_parallel}
        if shape.qk_norm:
            for name, size, heads in (("q", shape.q_size, shape.heads), ("k", shape.kv_size, shape.kv_heads)):
                rows = heads if shape.qk_norm_over == "head" else 1
                found |= {f"{part}.{name}": work.unit * size} | norm_saved(work, f"{part}.{name}_norm", rows)
        return found | self.narrow(part, work)

    def linears(self, part: Part, work: Work) -> dict[str, tuple[dict[str, int], int]]:
        shape = work.shape
        gathered = shape.hidden * work.keeping.tensor_parallel  # on each rank
        return {work.gathered(part.reads[0]): ({"q": shape.q_size, "k": shape.kv_size, "v": shape.kv_size}, gathered)}

    def forward_workspace(self, part: Part, work: Work, graph: bool) -> int:
        """q, k and v are made one after another: a projection is there with what is rotated or normed of it."""
        shape, keeping = work.shape, work.keeping
        q, kv, left = shape.q_size, shape.kv_size, shape.q_size + 2 * shape.kv_size
        steps = (shape.positions == "rope") + shape.qk_norm
        most = max(2 * q, q + 2 * kv) if steps else left
        gathered = shape.hidden * (keeping.tensor_parallel - (0 if graph else 1)) if keeping.tensor_parallel > 1 else 0
        return (max(0, most - left) + gathered) * work.unit + (norm_forward(work, q) if shape.qk_norm else 0)

    def backward_workspace(self, part: Part, work: Work, unread: bool = False) -> int:
        """v first, then k, then q; each gives a share of n's gradient, which are added up as they come."""
        shape = work.shape
        h, q, kv = shape.hidden * work.keeping.tensor_parallel, shape.q_size, shape.kv_size
        most = max(h, 2 * h - kv, h + q - 2 * kv, 2 * h - 2 * kv)
        normed = norm_backward(work, q) if shape.qk_norm else 0
        return max(most * work.unit, (h - 2 * kv) * work.unit + normed) + self.largest_matrix(work)
