"""The oracle shares no code with what it judges."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import values
from oracle import batch, plain_step
from torch import nn

import helixpipe as hp

BASE: dict[str, Any] = {"layers": 2, "hidden": 16, "heads": 4, "ffn": 24, "vocabulary": 19}
SHAPES: list[dict[str, Any]] = [
    {"tied": True, "kv_heads": 2, "qk_norm": True},
    {"causal": False, "mlp": "gelu", "norm": "layer", "bias": True, "qkv_bias": True},
    {"positions": "learned", "context": 16, "mlp": "gelu", "head_dim": 6, "kv_heads": 1},
    {
        "norms": "both",
        "norm_offset": True,
        "embed_scale": 4.0,
        "mlp": "geglu_tanh",
        "head_softcap": 3.0,
        "o_bias": True,
    },
    {"norms": "after", "qk_norm": True, "qk_norm_over": "width", "mlp": "geglu"},
    {"norm": "layer", "norm_bias": False, "embed_norm": True, "head_transform": True, "mlp": "gelu_tanh"},
]
# file -> what it may import, and the names of `helixpipe` that it may use
ALLOWED = {
    oracle: ({"__future__", "torch", "torch.nn.functional", "values", "helixpipe"}, {"ModelShape"}),
    values: ({"__future__", "collections.abc", "torch", "helixpipe"}, {"ModelShape", "Part", "Decoder"}),
}


@pytest.mark.parametrize("module", ALLOWED, ids=lambda module: module.__name__)
def test_of_the_library_it_reads_a_shape_and_values(module: Any) -> None:
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported, used = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module != "helixpipe", "write hp.NAME, which is looked for below"
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hp":
            used.add(node.attr)
    assert (imported, used) == ALLOWED[module]


def refuse(*args: object, **kwargs: object) -> None:
    raise AssertionError("a module or an autograd function ran")


@pytest.mark.parametrize("choices", SHAPES, ids=str)
def test_it_runs_no_module_and_no_autograd_function(monkeypatch: pytest.MonkeyPatch, choices: dict[str, Any]) -> None:
    shape = hp.ModelShape(**(BASE | choices))
    norm, proj = (hp.Decoder(shape).part(hp.Part(kind, 0)) for kind in ("norm", "proj"))
    x, o = torch.zeros(1, 2, shape.hidden), torch.zeros(1, 2, shape.q_size)
    monkeypatch.setattr(nn.Module, "__call__", refuse)
    for function in (
        torch.autograd.Function,
        torch.autograd.function._SingleLevelFunction,
    ):  # ours go to the second at once
        monkeypatch.setattr(function, "apply", refuse, raising=False)
    for runs in (lambda: norm(x), lambda: proj.o.forward(o)):
        with pytest.raises(AssertionError, match="a module or an autograd function ran"):
            runs()
    loss, gradients = plain_step(shape, *batch(shape, 2, 12))
    assert loss > 0
    assert sum(gradient.numel() for gradient in gradients.values()) > 16 * 16
