"""ModelShape: a decoder described by data. Costs, messages and parameters are computed from it, without torch."""

from __future__ import annotations

import copy
import fnmatch
import glob
import math
import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

from helixpipe.errors import ConfigError
from helixpipe.parts.kind import Kind, Shapes, maker
from helixpipe.parts.lora import Lora, is_adapter
from helixpipe.parts.part import Part, Value, chain, layer_parts
from helixpipe.parts.rotary import Rotary
from helixpipe.parts.slices import whole_name
from helixpipe.parts.work import Batch, Work

TENSOR_DIVIDED = ("heads", "kv_heads", "ffn")
"""What tensor parallelism divides, and with it every matrix that has such a side; all else is whole on each of its ranks."""


GATED, UNGATED = ("swiglu", "geglu", "geglu_tanh"), ("gelu", "gelu_tanh")
"""MLPs of three matrices and of two."""

# field -> the least it may be; kv_heads and head_dim of 0 follow from the others
_AT_LEAST = {
    "layers": 1, "hidden": 1, "heads": 1, "ffn": 1, "vocabulary": 1, "kv_heads": 0, "head_dim": 0, "context": 0,
    "norm_eps": 0, "window": 0, "softcap": 0, "head_softcap": 0, "attention_scale": 0, "window_rope_base": 0,
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
    norm_offset: bool = False
    """Whether an RMSNorm multiplies by 1 + weight (Gemma)."""
    norm_bias: bool = True
    """Whether a LayerNorm has a bias."""
    norms: str = "before"
    """Where a layer's norms are: `before` attention and MLP, `after` each of them (OLMo-2), or `both` (Gemma)."""
    embed_norm: bool = False
    """A norm of what the embedding makes, which then is layer 0's norm before attention too (ModernBERT)."""
    embed_scale: float = 1.0
    """What the embedding's rows are multiplied by, as rounded to their precision (Gemma)."""
    positions: str = "rope"
    """`rope` or `learned`."""
    rope_base: float = 10000.0
    rope: Rotary = field(default_factory=Rotary)
    """How rotary positions are scaled beyond the length that a model was made for."""
    rotary_share: float = 1.0
    """The share of a head that is rotated (Phi)."""
    window_rope_base: float = 0.0
    """The base of layers with a window, whose positions are never scaled; 0: theirs are as all layers' (Gemma 3)."""
    context: int = 0
    """The longest sequence that learned positions have room for; of rope what the model was made for, and no limit; 0:
    unknown."""
    mlp: str = "swiglu"
    """`swiglu`, `geglu`, `geglu_tanh` (three matrices), `gelu` or `gelu_tanh` (two)."""
    qkv_bias: bool = False
    o_bias: bool = False
    """Bias of attention's output projection."""
    bias: bool = False
    """Biases of all linear layers but q, k, v and the logits."""
    qk_norm: bool = False
    qk_norm_over: str = "head"
    """What q's and k's norms are over: each `head`, or the whole `width` before it is cut into heads (OLMo-2)."""
    attention_scale: float = 0.0
    """What scores are multiplied by; 0 is head_dim ** -0.5."""
    softcap: float = 0.0
    """c of c * tanh(score / c), attention's scores; 0 is none (Gemma 2)."""
    window: int = 0
    """A token at i sees j where |i - j| < window, in the layers that have the window; 0 is all."""
    window_pattern: tuple[bool, ...] = ()
    """Which layers have the window: repeated over the layers; () is all of them."""
    head_softcap: float = 0.0
    """The same of the logits."""
    head_transform: bool = False
    """A linear layer, activation and norm before the logits, whose bias the head then has (ModernBERT)."""
    tied: bool = False
    """Whether the head uses the embedding's table."""
    causal: bool = True
    lora: Lora | None = None
    """Adapters, and everything else is frozen."""
    frozen: tuple[str, ...] = ()
    """Parameters that are not trained, by full name: `embed.tokens.weight`, or patterns of shells: `embed.*`, `layers.[0-3].*`."""

    def __post_init__(self) -> None:
        for name, least in _AT_LEAST.items():
            if not getattr(self, name) >= least:
                raise ConfigError(f"model.{name}: {getattr(self, name)}; give at least {least}")
        object.__setattr__(self, "window_pattern", tuple(self.window_pattern))
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
        self._check_rotary()
        if self.positions == "learned" and self.context < 1:
            raise ConfigError("model.context: learned positions need one; give the longest sequence")
        choices = {
            "norm": ("rms", "layer"), "positions": ("rope", "learned"), "mlp": (*GATED, *UNGATED),
            "norms": ("before", "after", "both"), "qk_norm_over": ("head", "width"),
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"model.{name}: '{getattr(self, name)}' is not known; known: {', '.join(known)}")
        self._check_norms()

        if any(self.window_pattern) and not self.window:
            raise ConfigError(
                "model.window_pattern: which layers have a window, and there is none; set model.window too"
            )

        if isinstance(self.frozen, str):
            raise ConfigError(f"model.frozen: '{self.frozen}' is one text; give a list of names or patterns")
        object.__setattr__(self, "frozen", tuple(self.frozen))
        if self.lora is not None:
            self.lora.check(self.gated)

    def _check_norms(self) -> None:
        if self.norm_offset and self.norm != "rms":
            raise ConfigError(
                "model.norm_offset: true, and a LayerNorm multiplies by its weight alone; set model.norm to rms or leave it away"
            )
        if self.qk_norm_over != "head" and not self.qk_norm:
            raise ConfigError(
                f"model.qk_norm_over: '{self.qk_norm_over}', and q and k have no norm; set model.qk_norm to true or leave it away"
            )
        if not 0 < self.embed_scale < math.inf:
            raise ConfigError(f"model.embed_scale: {self.embed_scale:g}; give more than 0, and a finite number")

    def _check_rotary(self) -> None:
        if not 0 < self.rotary_share <= 1:
            raise ConfigError(f"model.rotary_share: {self.rotary_share:g}; give more than 0 and at most 1")
        if self.positions != "rope":
            if self.rope != Rotary():
                raise ConfigError(
                    f"model.rope.type: {self.rope.type} scales rotary positions, and these are {self.positions}; "
                    "remove model.rope or set model.positions to rope"
                )
            return
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim: {self.head_dim} is odd; rope needs an even one")
        if not self.rotated:
            raise ConfigError(
                f"model.rotary_share: {self.rotary_share:g} of a head of {self.head_dim} is no number; raise it"
            )
        self.rope.check(self.rotated, self.rope_base)

    @property
    def q_size(self) -> int:
        """Elements of q, and of o, per token."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of k, and of v, per token."""
        return self.kv_heads * self.head_dim

    @property
    def rotated(self) -> int:
        """Numbers of each head that rotary positions turn; the rest pass."""
        return int(self.head_dim * self.rotary_share)

    def rotary_of(self, layer: int) -> tuple[float, Rotary]:
        """Base and scaling of a layer's rotary positions."""
        if self.window_rope_base and self.window_of(layer):
            return self.window_rope_base, Rotary()
        return self.rope_base, self.rope

    @property
    def gated(self) -> bool:
        """Whether the MLP has three matrices."""
        return self.mlp in GATED

    @property
    def norms_before(self) -> bool:
        """Whether attention and MLP have norms of what they read."""
        return self.norms != "after"

    @property
    def norms_after(self) -> bool:
        """Whether attention and MLP have norms of what they make."""
        return self.norms != "before"

    def has_norm_before(self, layer: int) -> bool:
        """Whether a layer has a norm before attention: else n is x."""
        return self.norms_before and not (self.embed_norm and layer == 0)

    def window_of(self, layer: int) -> int:
        """Of a layer: a token at i sees j where |i - j| < window; 0 is all."""
        pattern = self.window_pattern or (True,)
        return self.window if pattern[layer % len(pattern)] else 0

    @property
    def windows(self) -> tuple[int, ...]:
        """All windows that layers have, rising; one where they are alike, (0,) where all see all."""
        return tuple(sorted({self.window_of(layer) for layer in range(self.layers)}))

    def sorts(self) -> dict[int, float]:
        """One layer of each sort, all of which cost the same -> the share of all layers that are of it."""
        found: dict[Hashable, list[int]] = {}
        for layer in range(self.layers):
            parts = layer_parts(layer, layer in self.opaque)
            found.setdefault(tuple(map(self.alike, parts)), []).append(layer)
        return {layers[0]: len(layers) / self.layers for layers in found.values()}

    @property
    def opaque(self) -> tuple[int, ...]:
        """Layers that are one block each, into which nobody looks: of a model of your own."""
        return ()

    def chain(self) -> tuple[Part, ...]:
        """All parts, in order."""
        return chain(self.layers, self.opaque)

    def example(self, segments: int = 1) -> Batch:
        """A small batch that the model takes."""
        return Batch(1, (1,) * segments)

    def check_sharing(self, context: int, tensor: int) -> None:
        """Raise ConfigError where so many ranks cannot share its sequences, or its matrices."""

    def check_length(self, sequence_length: int) -> None:
        """Raise ConfigError for a sequence longer than learned positions."""
        if self.positions == "learned" and sequence_length > self.context:
            raise ConfigError(
                f"train.sequence_length: {sequence_length} tokens, and learned positions have room for {self.context}; "
                "shorten it or raise model.context"
            )

    def about(self, part: Part) -> Kind:
        """What a part is in this model: the one road to everything that is said of it."""
        return part.about.of(part, self)

    def alike(self, part: Part) -> Hashable:
        """What parts that cost the same have in common, so that one of them is priced for all."""
        window = self.window_of(part.layer) if part.about.attends or part.about.opaque else 0
        return (self.about(part), window) if window else self.about(part)

    def value_shape(self, value: Value, batch: Batch, segment: int) -> tuple[int, ...]:
        """Shape of a value for one segment: [b, s, h]; q, k and v [b, s, heads, head_dim]; o [b, s, heads * head_dim]."""
        return maker(value.name).value_shape(value.name, Work(self, batch, segment))

    def parameters(self, part: Part) -> Shapes:
        """Name within the part -> shape. A tied head lists `output.weight` too: see `parameter_name`."""
        return self.about(part).parameters(self)

    def parameter_name(self, part: Part, name: str) -> str:
        """The one name of a parameter in checkpoints, gradients and messages, whatever the placement."""
        return self.about(part).parameter_name(part, name, self)

    def parameter_elements(self, parts: Iterable[Part]) -> dict[str, int]:
        """Full name of every parameter of these parts -> its elements."""
        return {
            self.parameter_name(part, name): math.prod(size)
            for part in parts
            for name, size in self.parameters(part).items()
        }

    def trains(self, name: str) -> bool:
        """Whether a parameter, by its full name, has gradients and is updated."""
        if self.lora is not None and not is_adapter(name):
            return False
        return not self.frozen or _any_of(self.frozen).match(whole_name(name)) is None

    def freezing(self, names: Iterable[str]) -> ModelShape:
        """The same model with these parameters frozen too."""
        found = copy.copy(self)
        whole = dict.fromkeys(map(whole_name, names))
        object.__setattr__(found, "frozen", (*self.frozen, *map(glob.escape, whole)))
        return found

    def tensor_share(self, ranks: int) -> ModelShape:
        """What each of so many tensor-parallel ranks holds of the parameters."""
        return replace(self, **{name: getattr(self, name) // ranks for name in TENSOR_DIVIDED})

    def forward_flops(self, part: Part, batch: Batch, segment: int) -> float:
        """Multiply-adds counted twice. Causal attention counts the half that kernels compute."""
        return self.about(part).forward_flops(part, Work(self, batch, segment))

    def backward_flops(self, part: Part, batch: Batch, segment: int) -> float:
        """Twice the forward; 2.5 times for fused attention, which computes the scores again."""
        return self.about(part).backward_flops(part, Work(self, batch, segment))

    def weight_flops(self, part: Part, batch: Batch, segment: int) -> float:
        """The share of the backward that makes weight gradients; none in attention."""
        return self.about(part).weight_flops(part, Work(self, batch, segment))

    @property
    def parameter_count(self) -> int:
        return sum(self.parameter_elements(self.chain()).values())


class Shaped(Protocol):
    """A model, as far as it is described."""

    @property
    def shape(self) -> ModelShape: ...


def handed_on(parts: Iterable[Part], shape: ModelShape) -> dict[str, str]:
    """Values that are other values' tensors, where these parts run: name -> the name of what was handed on."""
    handing = [part for part in parts if shape.about(part).hands_on]
    return {str(made): str(read) for part in handing for made, read in zip(part.makes, part.reads, strict=True)}


def shape_of(model: Shaped | ModelShape) -> ModelShape:
    """Of a model, or the shape itself."""
    return model if isinstance(model, ModelShape) else model.shape


@lru_cache(maxsize=64)
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """One expression for all of them."""
    return re.compile("|".join(map(fnmatch.translate, patterns)))
