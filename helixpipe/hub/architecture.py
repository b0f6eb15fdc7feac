"""Architecture: a model_type as data, from config.json to ModelShape and from tensors to parameters, and back.

    Tensor("layers.N.self_attn.q_proj", "layers.N.qkv.q")                                  weight and bias alike
    Tensor("layers.N.self_attn.qkv_proj", "layers.N.qkv.q", "layers.N.qkv.k", ...)         fused: rows one after another
    Tensor("h.N.attn.c_attn", ..., transposed=True)                                        [in, out] in the file

N is any layer. What a table cannot say is refused: reading what was written must give the shape again.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from helixpipe.errors import ConfigError
from helixpipe.hub.entries import Config, Entry
from helixpipe.hub.rope import spelled_as
from helixpipe.hub.window import repeating
from helixpipe.parts.shape import ModelShape

IGNORED = frozenset({
    "is_llama_config", "transformers.js_config",
    "architectures", "model_type", "transformers_version", "name_or_path",
    "auto_map", "torch_dtype", "dtype", "initializer_range", "use_cache", "pretraining_tp",
    "attn_implementation",
    "return_dict", "use_return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward",
    "gradient_checkpointing", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "task_specific_params", "tokenizer_class", "prefix", "bos_token_id", "eos_token_id", "pad_token_id",
    "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id", "decoder_start_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "cache_implementation", "max_length", "min_length",
    "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "output_scores", "return_dict_in_generate", "suppress_tokens", "begin_suppress_tokens",
    "exponential_decay_length_penalty", "remove_invalid_values", "torchscript", "use_bfloat16",
    "tf_legacy_loss", "unsloth_version", "unsloth_fixed",
})  # fmt: skip
"""Keys that say nothing of what a model computes in training, beside those that begin with an underscore: notes of who wrote them."""
REFUSED = {
    "quantization_config": "its weights are quantised; save it with whole weights",
    "compression_config": "its weights are compressed; save it with whole weights",
    "per_layer_config": "layers that differ from each other are not known here",
}


class Place(NamedTuple):
    """Where a parameter is in a file: rows of a tensor, after it is transposed."""

    tensor: str
    size: tuple[int, ...]
    """Of the whole tensor, as it is in the file."""
    start: int
    stop: int
    transposed: bool


class Tensor:
    """A tensor of a file, and the parameters that are its rows."""

    def __init__(self, file: str, *ours: str, transposed: bool = False) -> None:
        self.file, self.ours, self.transposed = file, ours, transposed


@dataclass(frozen=True)
class Architecture:
    """One model_type."""

    name: str
    model_class: str
    """Of transformers: what `architectures` of a config names."""
    entries: tuple[Entry, ...]
    tensors: tuple[Tensor, ...]
    """Without the prefix, but for those outside the base model."""
    prefix: str = "model."
    """Of the base model's tensors, in a model with a head."""
    outside: tuple[str, ...] = ("lm_head",)
    """Modules that have no prefix."""
    tied: str = "lm_head.weight"
    """A tied head's table, which a file may hold again."""
    buffers: str = r".*rotary_emb\.inv_freq"
    """Tensors of older files that are no parameters."""
    ignored: tuple[str, ...] = ()
    """More keys that change nothing."""
    _lines: dict[str, tuple[Tensor, int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._lines.update({ours: (tensor, i) for tensor in self.tensors for i, ours in enumerate(tensor.ours)})

    @property
    def keys(self) -> list[str]:
        """Those of a config that it reads."""
        return [key for entry in self.entries for key in entry.keys]

    def read(self, config: Config) -> ModelShape:
        """The shape that a config describes. Raises ConfigError, which begins with the key."""
        known = {*self.keys, *self.ignored, *IGNORED}
        for key, value in config.items():
            if key in REFUSED and value:
                raise ConfigError(f"{key}: {REFUSED[key]}")
            if key.startswith("_") or key in known:
                continue
            if value is not None and value is not False and value not in ("", [], {}):
                raise ConfigError(
                    f"{key}: {_short(value)} is not known of {self.name}, and may change what it computes; "
                    "remove the key if it does not"
                )
        found: dict[str, Any] = {}
        for entry in self.entries:
            found |= entry.read(config)
        return canonical(ModelShape(**found))

    def write(self, shape: ModelShape, base: Config | None = None) -> dict[str, Any]:
        """The config of a shape. What `base`, a config of this architecture, says as the shape does stays as it is.

        Raises ConfigError that names the field that no config of this architecture can say.
        """
        made = self.say(shape, base)
        if differs := self.differences(shape, made):
            name, value = next(iter(differs.items()))
            raise ConfigError(f"model.{name}: {_short(value)}; no config of {self.name} can say so")
        return made

    def say(self, shape: ModelShape, base: Config | None = None) -> dict[str, Any]:
        """The nearest config to a shape."""
        shape = canonical(dataclasses.replace(shape, frozen=(), lora=None))
        made = dict(base or {"architectures": [self.model_class], "model_type": self.name})
        for entry in self.entries:
            if base is not None:
                said = self.read(made)  # what an entry says may hang on what one before has changed
                if all(getattr(shape, name) == getattr(said, name) for name in entry.read(made)):
                    continue
            made = {key: value for key, value in made.items() if key not in entry.keys} | spelled_as(
                made, entry.write(shape)
            )
        return made

    def differences(self, shape: ModelShape, config: Config) -> dict[str, Any]:
        """Fields of a shape, with their values, that a config says otherwise."""
        said, shape = self.read(config), canonical(dataclasses.replace(shape, frozen=(), lora=None))
        names = [name for name in _fields_of(shape) if name != "context" or shape.context]  # 0 is not known
        return {name: value for name in names if (value := getattr(shape, name)) != getattr(said, name)}

    def places(self, shape: ModelShape) -> dict[str, Place]:
        """Full name of every parameter -> where it is, in files of a model with a head."""
        sizes = {
            shape.parameter_name(part, name): size
            for part in shape.chain()
            for name, size in shape.parameters(part).items()
        }
        return {name: self._place(name, sizes) for name in sizes}

    def _place(self, name: str, sizes: Mapping[str, tuple[int, ...]]) -> Place:
        module, _, kind = name.rpartition(".")
        match = re.match(r"layers\.(\d+)\.", module)
        layer = match[1] if match else ""
        line = self._lines.get(re.sub(r"^layers\.\d+\.", "layers.N.", module))
        if line is None:
            raise ConfigError(f"{name}: {self.name} has no such tensor")
        tensor, at = line
        rows = [sizes[f"{_of(ours, layer)}.{kind}"][0] for ours in tensor.ours]
        start = sum(rows[:at])
        size = (sum(rows), *sizes[name][1:])
        turned = tensor.transposed and len(size) == 2
        file = _of(tensor.file, layer)
        prefix = "" if file.startswith(self.outside) else self.prefix
        return Place(f"{prefix}{file}.{kind}", size[::-1] if turned else size, start, start + rows[at], turned)


def canonical(shape: ModelShape) -> ModelShape:
    """The same model, said in one way where there are several."""
    sliding = [bool(shape.window_of(layer)) for layer in range(shape.layers)]
    window = shape.window if any(sliding) else 0
    local = shape.window_rope_base if window else 0.0
    if local == shape.rope_base and shape.rope.type == "default":
        local = 0.0
    return dataclasses.replace(
        shape,
        o_bias=shape.o_bias and not shape.bias,  # which has it too
        attention_scale=0.0 if shape.attention_scale == shape.head_dim**-0.5 else shape.attention_scale,
        window=window,
        window_pattern=repeating(sliding) if window else (),
        window_rope_base=local,
    )


def _fields_of(shape: ModelShape) -> dict[str, Any]:
    return {each.name: getattr(shape, each.name) for each in dataclasses.fields(shape)}


def _of(name: str, layer: str) -> str:
    """A line of a table in one layer."""
    return name.replace(".N.", f".{layer}.")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
