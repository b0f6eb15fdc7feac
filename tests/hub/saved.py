"""Folders that transformers itself wrote: a tiny random model of every architecture."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WORDS, LENGTH, LAYERS = 19, 12, 4
BASE: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 16,
}  # fmt: skip
# model_type -> keys that differ from transformers' defaults, and from BASE
KEYS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-5, "attention_bias": True},
    "qwen2": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"head_dim": 6, "num_key_value_heads": 1},
    "mistral": {"sliding_window": None},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "gemma2": {"head_dim": 6, "sliding_window": 5, "query_pre_attn_scalar": 9},
    "gemma3_text": {"head_dim": 6, "sliding_window": 5, "sliding_window_pattern": 3},
    "olmo2": {},
    "gpt2": {
        "n_embd": 16, "n_layer": LAYERS, "n_head": 4, "n_positions": 16, "n_inner": 24,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "modernbert": {"local_attention": 6, "cls_token_id": None, "sep_token_id": None},
}  # fmt: skip
_NOT = {
    "gpt2": ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "max_position_embeddings"),
    "modernbert": ("num_key_value_heads",),
}  # fmt: skip


@functools.cache
def hugging_face() -> Any:
    """The library. Late: it is slow, and ranks import this file and need none of it."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read at import; nothing here would be fetched
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def class_of(name: str) -> Any:
    return hugging_face().AutoModelForMaskedLM if name == "modernbert" else hugging_face().AutoModelForCausalLM


def model_of(name: str, dtype: torch.dtype = torch.float64, **keys: Any) -> Any:
    """A random model; no norm is 1 and no bias 0."""
    base = {key: value for key, value in BASE.items() if key not in _NOT.get(name, ())}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = hugging_face().AutoConfig.for_model(name, **base | tokens | KEYS[name] | keys)
    model = class_of(name).from_config(config, attn_implementation="eager", dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * drawn + (1 if parameter.dim() == 1 else 0))
    return model.eval()


def saved(folder: Path, name: str, dtype: torch.dtype = torch.float64, **keys: Any) -> Any:
    """Its model, written to a folder."""
    model = model_of(name, dtype, **keys)
    model.save_pretrained(folder)
    return model


def batch(sequences: int = 8) -> tuple[Tensor, Tensor]:
    """Tokens and targets [sequences, length]."""
    generator = torch.Generator().manual_seed(1)
    both = torch.randint(0, WORDS, (2, sequences, LENGTH), generator=generator)
    return both[0], both[1]


def loss_of(model: Any) -> float:
    """What transformers says, of its logits in their own precision."""
    tokens, targets = batch()
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        return float(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def change_config(folder: Path, **keys: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | keys))
