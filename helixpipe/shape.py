"""ModelShape: a decoder described by data. Costs, messages and parameters are computed from it, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from helixpipe.errors import ConfigError, nearest
from helixpipe.schedule.parts import Part, Value

TENSOR_DIVIDED = ("heads", "kv_heads", "ffn")
"""What tensor parallelism divides, and with it every matrix that has such a side; all else is whole on each of its ranks."""


@dataclass(frozen=True)
class Batch:
    """What one micro-batch looks like: `microbatch_size` sequences, cut into segments of these lengths (tokens)."""

    microbatch_size: int
    segment_lengths: tuple[int, ...]

    @property
    def sequence_length(self) -> int:
        return sum(self.segment_lengths)

    def start(self, segment: int) -> int:
        """The segment's first position in the sequence."""
        return sum(self.segment_lengths[:segment])

    def tokens(self, segment: int) -> int:
        return self.microbatch_size * self.segment_lengths[segment]


# field -> the least it may be; kv_heads and head_dim of 0 follow from the others
_AT_LEAST = {
    "layers": 1, "hidden": 1, "heads": 1, "ffn": 1, "vocabulary": 1, "kv_heads": 0, "head_dim": 0, "context": 0,
    "norm_eps": 0,
}  # fmt: skip


@dataclass(frozen=True)
class ModelShape:
    """A decoder: every size and every choice. Subclass it to describe a model of your own."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocabulary: int
    kv_heads: int = 0
    """Key/value heads; 0 means as many as `heads`."""
    head_dim: int = 0
    """Size of a head; 0 means hidden / heads."""
    norm: str = "rms"
    """`rms` or `layer`."""
    norm_eps: float = 1e-5
    positions: str = "rope"
    """`rope` or `learned`."""
    rope_base: float = 10000.0
    context: int = 0
    """The longest sequence that learned positions have room for; unused by rope."""
    mlp: str = "swiglu"
    """`swiglu` (three matrices) or `gelu` (two)."""
    qkv_bias: bool = False
    bias: bool = False
    """Biases of the other linear layers."""
    qk_norm: bool = False
    tied: bool = False
    """Whether the head uses the embedding's table."""
    causal: bool = True

    def __post_init__(self) -> None:
        for name, least in _AT_LEAST.items():
            if not getattr(self, name) >= least:
                raise ConfigError(f"model.{name}: {getattr(self, name)}; give at least {least}")
        if not self.rope_base > 0:
            raise ConfigError(f"model.rope_base: {self.rope_base:g}; give more than 0")
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        if not self.head_dim and self.hidden % self.heads:
            raise ConfigError(
                f"model.heads: {self.heads} heads do not divide hidden size {self.hidden}; "
                "choose a divisor or set model.head_dim"
            )
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden // self.heads)
        if self.heads % self.kv_heads:
            raise ConfigError(f"model.kv_heads: {self.kv_heads} do not divide {self.heads} heads; choose a divisor")
        if self.positions == "rope" and self.head_dim % 2:
            raise ConfigError(f"model.head_dim: {self.head_dim} is odd; rope needs an even one")
        if self.positions == "learned" and self.context < 1:
            raise ConfigError("model.context: learned positions need one; give the longest sequence")
        choices = {"norm": ("rms", "layer"), "positions": ("rope", "learned"), "mlp": ("swiglu", "gelu")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"model.{name}: '{getattr(self, name)}' is not known; known: {', '.join(known)}")

    @property
    def q_size(self) -> int:
        """Elements of q, and of o, per token."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of k, and of v, per token."""
        return self.kv_heads * self.head_dim

    def check_length(self, sequence_length: int) -> None:
        """Raise ConfigError for a sequence longer than learned positions."""
        if self.positions == "learned" and sequence_length > self.context:
            raise ConfigError(
                f"train.sequence_length: {sequence_length} tokens, and learned positions have room for {self.context}; "
                "shorten it or raise model.context"
            )

    def value_shape(self, value: Value, batch: Batch, segment: int) -> tuple[int, ...]:
        """Shape of a value for one segment: [b, s, h]; q, k and v [b, s, heads, head_dim]; o [b, s, heads * head_dim]."""
        lead = (batch.microbatch_size, batch.segment_lengths[segment])
        if value.name == "q":
            return (*lead, self.heads, self.head_dim)
        if value.name in ("k", "v"):
            return (*lead, self.kv_heads, self.head_dim)
        return (*lead, self.q_size if value.name == "o" else self.hidden)

    def parameters(self, part: Part) -> dict[str, tuple[int, ...]]:
        """Name within the part -> shape. A tied head lists `output.weight` too: see `parameter_name`."""
        h, q, kv = self.hidden, self.q_size, self.kv_size

        def norm(name: str) -> dict[str, tuple[int, ...]]:
            names = ("weight", "bias") if self.norm == "layer" else ("weight",)
            return {f"{name}{each}": (h,) for each in names}

        def linear(name: str, out: int, into: int, bias: bool) -> dict[str, tuple[int, ...]]:
            found: dict[str, tuple[int, ...]] = {f"{name}.weight": (out, into)}
            return found | {f"{name}.bias": (out,)} if bias else found

        if part.kind == "embed":
            rows = {"tokens": self.vocabulary} | ({"positions": self.context} if self.positions == "learned" else {})
            return {f"{name}.weight": (count, h) for name, count in rows.items()}
        if part.kind == "norm":
            return norm("")
        if part.kind == "qkv":
            found = linear("q", q, h, self.qkv_bias) | linear("k", kv, h, self.qkv_bias)
            found |= linear("v", kv, h, self.qkv_bias)
            extra = {"q_norm.weight": (self.head_dim,), "k_norm.weight": (self.head_dim,)}
            return found | (extra if self.qk_norm else {})
        if part.kind == "proj":
            return linear("o", h, q, self.bias)
        if part.kind == "mlp":
            gate = linear("gate", self.ffn, h, self.bias) if self.mlp == "swiglu" else {}
            up_down = linear("up", self.ffn, h, self.bias) | linear("down", h, self.ffn, self.bias)
            return norm("norm.") | gate | up_down
        if part.kind == "head":
            return norm("norm.") | linear("output", self.vocabulary, h, False)
        if part.kind == "block":
            return {
                f"{inner}.{name}": shape
                for inner in ("norm", "qkv", "proj", "mlp")
                for name, shape in self.parameters(Part(inner, part.layer)).items()
            }
        return {}

    def parameter_name(self, part: Part, name: str) -> str:
        """The one name of a parameter in checkpoints, gradients and messages, whatever the placement."""
        if part.kind == "head" and name == "output.weight" and self.tied:
            return "embed.tokens.weight"
        if part.kind in ("embed", "head"):
            return f"{part.kind}.{name}"
        if part.kind == "block":
            return f"layers.{part.layer}.{name}"
        return f"layers.{part.layer}.{part.kind}.{name}"

    def parameter_elements(self, parts: Iterable[Part]) -> dict[str, int]:
        """Full name of every parameter of these parts -> its elements."""
        return {
            self.parameter_name(part, name): math.prod(size)
            for part in parts
            for name, size in self.parameters(part).items()
        }

    def tensor_share(self, ranks: int) -> ModelShape:
        """What each of so many tensor-parallel ranks holds of the parameters."""
        return replace(self, **{name: getattr(self, name) // ranks for name in TENSOR_DIVIDED})

    def forward_flops(self, part: Part, batch: Batch, segment: int) -> float:
        """Multiply-adds counted twice. Causal attention counts the half that kernels compute."""
        tokens = batch.tokens(segment)
        if part.kind == "attn":
            start = batch.start(segment)
            end = start + batch.segment_lengths[segment]
            pairs = (end**2 - start**2) / 2 if self.causal else (end - start) * batch.sequence_length
            return 4.0 * batch.microbatch_size * self.q_size * pairs
        if part.kind == "block":
            inner = (Part(kind, part.layer) for kind in ("qkv", "attn", "proj", "mlp"))
            return sum(self.forward_flops(p, batch, segment) for p in inner)
        if part.kind == "embed":
            return 0.0
        matrices = [shape for shape in self.parameters(part).values() if len(shape) == 2]
        return 2.0 * tokens * sum(rows * columns for rows, columns in matrices)

    def backward_flops(self, part: Part, batch: Batch, segment: int) -> float:
        """Twice the forward; 2.5 times for fused attention, which computes the scores again."""
        forward = self.forward_flops(part, batch, segment)
        if part.kind == "block":
            attention = self.forward_flops(Part("attn", part.layer), batch, segment)
            return 2 * forward + 0.5 * attention
        return forward * (2.5 if part.kind == "attn" else 2.0)

    def weight_flops(self, part: Part, batch: Batch, segment: int) -> float:
        """The share of the backward that makes weight gradients: a product as large as the forward's; none in attention."""
        if part.kind == "attn":
            return 0.0
        forward = self.forward_flops(part, batch, segment)
        return (
            forward - self.forward_flops(Part("attn", part.layer), batch, segment) if part.kind == "block" else forward
        )

    @property
    def parameter_count(self) -> int:
        kinds = [Part("embed", 0), Part("head", self.layers)]
        kinds += [Part(kind, layer) for layer in range(self.layers) for kind in ("norm", "qkv", "proj", "mlp")]
        return sum(self.parameter_elements(kinds).values())


def _paper(layers: int, hidden: int, heads: int) -> ModelShape:
    """The models of the HelixPipe paper (arXiv 2507.00394, section 5): GPT-like, MLP of 4h."""
    return ModelShape(
        layers=layers, hidden=hidden, heads=heads, ffn=4 * hidden, vocabulary=50257, mlp="gelu", norm="layer"
    )


SHAPES: dict[str, ModelShape] = {
    "tiny": ModelShape(layers=4, hidden=128, heads=4, ffn=512, vocabulary=256, mlp="gelu"),
    "1.3b": _paper(24, 2048, 16),
    "3b": _paper(16, 4096, 32),
    "7b": _paper(32, 4096, 32),
    "13b": _paper(40, 5120, 40),
    "gpt2": ModelShape(
        layers=12, hidden=768, heads=12, ffn=3072, vocabulary=50257, norm="layer", positions="learned",
        context=1024, mlp="gelu", qkv_bias=True, bias=True, tied=True,
    ),
    "llama3-8b": ModelShape(
        layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocabulary=128256, rope_base=500000.0,
    ),
    "qwen2.5-7b": ModelShape(
        layers=28, hidden=3584, heads=28, kv_heads=4, ffn=18944, vocabulary=152064, rope_base=1e6,
        norm_eps=1e-6, qkv_bias=True,
    ),
}  # fmt: skip


def named_shape(name: str, **changes: object) -> ModelShape:
    """The shape of that name with some fields changed; raises ConfigError that names the nearest."""
    if name not in SHAPES:
        raise ConfigError(f"model.name: '{name}' is not known{nearest(name, SHAPES)}")
    base = SHAPES[name]
    if "hidden" in changes or "heads" in changes:  # derived sizes follow, unless given
        derived = {"head_dim": 0} | ({"kv_heads": 0} if base.kv_heads == base.heads else {})
        changes = derived | changes
    return replace(base, **changes)  # type: ignore[arg-type]
