"""More of Hugging Face's own models with the same weights: loss and every gradient, in float64, as in `test_transformers`.

transformers computes norms, rotary tables and the softmax of these in float32 whatever the model's own precision; with each
float32 that it asks for made float64 (`Wide`) it must agree as exactly as plain autograd does, and does. Windows, soft caps
of scores and rotary scalings are off here.
"""

from __future__ import annotations

import functools
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import batch, plain_gradients
from ranks import Ranks, mesh_of
from test_mesh import device_mesh
from test_transformers import EXACT, GPT2_NAMES, Named, Truth, Wide, equal, hugging_face, with_random_values
from torch import Tensor
from values import Given, initial_values

import helixpipe as hp

SIZES: dict[str, Any] = {"hidden": 12, "heads": 4, "head_dim": 6, "ffn": 20, "vocabulary": 19}
LENGTH = 12
LENGTHS = {1: None, 3: (6, 1, 5)}
THEIRS: dict[str, Any] = {
    "vocab_size": 19, "hidden_size": 12, "num_attention_heads": 4, "intermediate_size": 20, "max_position_embeddings": 16,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    "norms": "both", "norm_offset": True, "norm_eps": 1e-6, "embed_scale": 12**0.5, "mlp": "geglu_tanh", "tied": True,
    "kv_heads": 2,
}  # fmt: skip


def rope(base: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": base}


def fused(*names: str, sizes: tuple[int, ...]) -> Callable[[Tensor], Named]:
    """One of their matrices is several of ours, one above the other."""
    return lambda tensor: dict(zip(names, tensor.split(sizes), strict=True))


@dataclass(frozen=True)
class Architecture:
    config: str
    shape: dict[str, Any]
    theirs: dict[str, Any]
    names: dict[str, str]
    """Their module -> ours; regular expressions."""
    fused: dict[str, Callable[[Tensor], Named]] = field(default_factory=dict)
    """Our module that is several, by how its name ends."""
    of_layers: Callable[[int], dict[str, Any]] = lambda layers: {"layer_types": ["full_attention"] * layers}
    head: str = "AutoModelForCausalLM"
    transposed: bool = False
    """Whether linear layers are [in, out]."""


LLAMA = {
    r"model\.embed_tokens": "embed.tokens",
    r"model\.layers\.(\d+)\.input_layernorm": r"layers.\1.norm",
    r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj": r"layers.\1.qkv.\2",
    r"model\.layers\.(\d+)\.self_attn\.([qk])_norm": r"layers.\1.qkv.\2_norm",
    r"model\.layers\.(\d+)\.self_attn\.o_proj": r"layers.\1.proj.o",
    r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj": r"layers.\1.mlp.\2",
    r"model\.norm": "head.norm",
    r"lm_head": "head.output",
}
AFTER = LLAMA | {
    r"model\.layers\.(\d+)\.post_attention_layernorm": r"layers.\1.proj.norm",
    r"model\.layers\.(\d+)\.pre_feedforward_layernorm": r"layers.\1.mlp.norm",
    r"model\.layers\.(\d+)\.post_feedforward_layernorm": r"layers.\1.mlp.after",
}
BEFORE = LLAMA | {r"model\.layers\.(\d+)\.post_attention_layernorm": r"layers.\1.mlp.norm"}
PHI = BEFORE | {
    r"model\.layers\.(\d+)\.self_attn\.qkv_proj": r"layers.\1.qkv",
    r"model\.layers\.(\d+)\.mlp\.gate_up_proj": r"layers.\1.mlp",
}
MODERNBERT = {
    r"model\.embeddings\.tok_embeddings": "embed.tokens",
    r"model\.embeddings\.norm": "embed.norm",
    r"model\.layers\.(\d+)\.attn_norm": r"layers.\1.norm",
    r"model\.layers\.(\d+)\.attn\.Wqkv": r"layers.\1.qkv",
    r"model\.layers\.(\d+)\.attn\.Wo": r"layers.\1.proj.o",
    r"model\.layers\.(\d+)\.mlp_norm": r"layers.\1.mlp.norm",
    r"model\.layers\.(\d+)\.mlp\.Wi": r"layers.\1.mlp",
    r"model\.layers\.(\d+)\.mlp\.Wo": r"layers.\1.mlp.down",
    r"model\.final_norm": "head.norm",
    r"head\.dense": "head.dense",
    r"head\.norm": "head.dense_norm",
    r"decoder": "head",
}

ARCHITECTURES = {
    "gemma2": Architecture(
        "Gemma2Config",
        GEMMA | {"rope_base": 1e4, "head_softcap": 3.0, "softcap": 0.5, "attention_scale": 3**-0.5, "window": 5,
                 "window_pattern": (True, False)},
        {"num_key_value_heads": 2, "head_dim": 6, "query_pre_attn_scalar": 3, "attn_logit_softcapping": 0.5,
         "final_logit_softcapping": 3.0, "rope_parameters": rope(1e4), "hidden_activation": "gelu_pytorch_tanh",
         "sliding_window": 5},
        AFTER, of_layers=lambda layers: {},
    ),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        GEMMA | {"rope_base": 1e6, "qk_norm": True, "window": 4, "window_pattern": (True, True, False),
                 "window_rope_base": 1e4},
        {"num_key_value_heads": 2, "head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 4,
         "rope_parameters": {"full_attention": rope(1e6), "sliding_attention": rope(1e4)}},
        AFTER,
        of_layers=lambda layers: {"layer_types": [f"{'full' if i % 3 == 2 else 'sliding'}_attention" for i in range(layers)]},
    ),
    "olmo2": Architecture(
        "Olmo2Config",
        {"norms": "after", "rope_base": 5e5, "qk_norm": True, "qk_norm_over": "width", "kv_heads": 2},
        {"num_key_value_heads": 2, "head_dim": 6, "rope_parameters": rope(5e5), "tie_word_embeddings": False},
        AFTER, of_layers=lambda layers: {},
    ),
    "phi3": Architecture(
        "Phi3Config", {"kv_heads": 2, "rope_base": 1e4},
        {"num_key_value_heads": 2, "head_dim": 6, "rope_parameters": rope(1e4) | {"partial_rotary_factor": 1.0},
         "tie_word_embeddings": False},
        PHI,
        {"qkv": fused("q", "k", "v", sizes=(24, 12, 12)), "mlp": fused("gate", "up", sizes=(20, 20))},
        lambda layers: {},
    ),
    "modernbert": Architecture(
        "ModernBertConfig",
        {"hidden": 16, "head_dim": 0, "norm": "layer", "norm_bias": False, "embed_norm": True, "rope_base": 16e4,
         "mlp": "geglu", "head_transform": True, "tied": True, "causal": False, "window": 4,
         "window_pattern": (False, True, True), "window_rope_base": 1e4},
        {"hidden_size": 16, "hidden_activation": "gelu", "cls_token_id": None, "sep_token_id": None,
         "local_attention": 6,  # half of it both ways
         "rope_parameters": {"full_attention": rope(16e4), "sliding_attention": rope(1e4)}},
        MODERNBERT,
        {"qkv": fused("q", "k", "v", sizes=(16, 16, 16)), "mlp": fused("gate", "up", sizes=(20, 20))},
        of_layers=lambda layers: {}, head="AutoModelForMaskedLM",
    ),
    "mistral": Architecture(
        "MistralConfig", {"kv_heads": 2, "rope_base": 1e4, "window": 5},
        {"num_key_value_heads": 2, "head_dim": 6, "rope_parameters": rope(1e4), "tie_word_embeddings": False,
         "sliding_window": 5},
        BEFORE, of_layers=lambda layers: {},
    ),
    "qwen2": Architecture(
        "Qwen2Config",
        {"hidden": 16, "head_dim": 0, "kv_heads": 2, "rope_base": 1e6, "qkv_bias": True, "tied": True, "window": 3,
         "window_pattern": (False, False, *[True] * 6)},
        {"hidden_size": 16, "num_key_value_heads": 2, "rope_parameters": rope(1e6), "tie_word_embeddings": True,
         "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
        BEFORE, of_layers=lambda layers: {},
    ),
    "llama with biases": Architecture(
        "LlamaConfig", {"kv_heads": 2, "rope_base": 5e5, "norm_eps": 1e-6, "qkv_bias": True, "o_bias": True},
        {"num_key_value_heads": 2, "head_dim": 6, "rope_parameters": rope(5e5), "attention_bias": True,
         "tie_word_embeddings": False},
        BEFORE, of_layers=lambda layers: {},
    ),
    "gpt2": Architecture(
        "GPT2Config",
        {"head_dim": 0, "norm": "layer", "positions": "learned", "context": 16, "mlp": "gelu_tanh", "qkv_bias": True,
         "bias": True, "tied": True},
        {"n_embd": 12, "n_head": 4, "n_inner": 20, "n_positions": 16, "activation_function": "gelu_new"},
        GPT2_NAMES, {"qkv": fused("q", "k", "v", sizes=(12, 12, 12))}, lambda layers: {}, transposed=True,
    ),
}  # fmt: skip
BIDIRECTIONAL = ("modernbert",)


def shape_of(name: str, layers: int) -> hp.ModelShape:
    return hp.ModelShape(layers=layers, **(SIZES | ARCHITECTURES[name].shape))


def transformer(name: str, layers: int) -> Any:
    """Their model of our shape in float64, with random values: no norm multiplies by 1 and no bias is 0."""
    transformers, which = hugging_face(), ARCHITECTURES[name]
    given = {"num_hidden_layers": layers} | THEIRS | which.of_layers(layers) | which.theirs
    shape = shape_of(name, layers)
    eps = {"layer_norm_epsilon": shape.norm_eps} if which.transposed else {"rms_norm_eps": shape.norm_eps}
    if name in BIDIRECTIONAL:
        eps = {"norm_eps": shape.norm_eps}
    config = getattr(transformers, which.config)(**given, **eps)
    model = getattr(transformers, which.head).from_config(config, attn_implementation="eager", dtype=torch.float64)
    return with_random_values(model)


def ours(name: str, theirs: Named) -> Named:
    """Values or gradients under our names, in our form."""
    which = ARCHITECTURES[name]
    found: Named = {}
    for full, tensor in theirs.items():
        module, kind = full.rsplit(".", 1)
        (mine,) = [
            re.sub(f"{pattern}$", to, module) for pattern, to in which.names.items() if re.fullmatch(pattern, module)
        ]
        if which.transposed and "c_" in module and kind == "weight":
            tensor = tensor.T
        split = which.fused.get(mine.rsplit(".", 1)[-1])
        pieces = {mine: tensor} if split is None else {f"{mine}.{inner}": t for inner, t in split(tensor).items()}
        found |= {f"{each}.{kind}": t for each, t in pieces.items()}
    return found


@functools.cache
def truth(name: str, layers: int, sequences: int) -> Truth:
    """Their loss, parameters and gradients under our names."""
    hugging_face()  # before float32 means something else
    tokens, targets = batch(shape_of(name, layers), sequences, LENGTH)
    with Wide():
        model = transformer(name, layers)
        logits = model(input_ids=tokens).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
    parameters = dict(model.named_parameters())
    values = ours(name, {each: p.detach() for each, p in parameters.items()})
    return Truth(float(loss.detach()), values, ours(name, {each: p.grad for each, p in parameters.items()}))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_number_has_a_place(name: str) -> None:
    """Names and sizes are ours, and nothing of theirs is lost."""
    values = truth(name, 3, 4).values
    expected = initial_values(shape_of(name, 3))
    assert {each: value.shape for each, value in values.items()} == {each: v.shape for each, v in expected.items()}
    theirs = sorted(number for p in transformer(name, 3).parameters() for number in p.flatten().tolist())
    assert sorted(number for value in values.values() for number in value.flatten().tolist()) == theirs


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plain_autograd_equals_it(name: str) -> None:
    """The oracle of other tests knows these models too."""
    expected = truth(name, 3, 4)
    shape = shape_of(name, 3)
    equal(expected, *plain_gradients(shape, expected.values, *batch(shape, 4, LENGTH)))


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    mesh: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    recompute: str = "selective"
    chunk: int = 0

    def __str__(self) -> str:
        words = [self.name, self.family, *(f"{axis}{size}" for axis, size in self.mesh.items())]
        words += [self.recompute, f"chunk{self.chunk}", *(f"{key}={value}" for key, value in self.options.items())]
        return "-".join(words)

    @property
    def layers(self) -> int:
        """Two stages on each rank can have one, and no even share where ranks are odd."""
        return 2 * self.mesh["pp"] + self.mesh["pp"] % 2


def run_case(case: Case, values: bytes) -> tuple[float, Named, dict[str, int], int] | None:
    """On a rank of the four: loss, gradients, which of them are cut, and the rank in tp; None where the case has no use."""
    ranks = case.mesh["pp"]
    mesh = device_mesh(tuple(case.mesh.items())) if "tp" in case.mesh else mesh_of(ranks)
    if mesh is None:
        return None
    schedule = hp.build_schedule(case.family, ranks=ranks, layers=case.layers, microbatches=4, **case.options)
    shape = shape_of(case.name, case.layers)
    pipeline = hp.Pipeline(
        Given(shape, pickle.loads(values), case.chunk), schedule, mesh, dtype=torch.float64, recompute=case.recompute,
        timeout_s=30, segment_lengths=LENGTHS[schedule.segments],
    )  # fmt: skip
    tokens = batch(shape, 4, LENGTH)
    loss = pipeline.step(*tokens)
    assert abs(pipeline.evaluate(*tokens) - loss) < EXACT[0]
    gradients = {name: p.grad.clone() for name, p in pipeline.parameters.items() if p.grad is not None}
    cuts = pipeline._tensor.cuts if pipeline._tensor else {}
    pipeline.close()
    return loss, gradients, cuts, pipeline.mesh.here.tp


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("1f1b", {}), ("seq1f1b", {"segments": 3}), ("zb_v", {}), ("helix", {"travel": "none"}),
    ("helix", {"travel": "qkv", "folds": 1}), ("helix", {"travel": "attention"}), ("zb_h1", {"opaque": True}),
]  # fmt: skip
RECOMPUTE = ("none", "full", "selective")


def covering() -> list[Case]:
    """Every family on every architecture that takes it, on one to three ranks; the rest in turn."""
    cases = []
    for i, (family, options) in enumerate(FAMILIES):
        for j, name in enumerate(ARCHITECTURES):
            if name in BIDIRECTIONAL and "segments" in options:
                continue
            chunk = (0, 5)[(i + j) % 2]
            cases.append(
                Case(name, family, {"pp": 1 + (i + j) % 3}, options, RECOMPUTE[(i + i // 3 + 2 * j) % 3], chunk)
            )
    return cases


TENSOR = [
    Case(name, family, {"pp": 2, "tp": 2}, options, recompute, chunk)
    for name, family, options, recompute, chunk in [
        ("gemma2", "1f1b", {}, "none", 0),
        ("gemma3", "zb_v", {}, "selective", 6),
        ("gemma3", "helix", {"travel": "qkv", "folds": 1}, "full", 0),
        ("modernbert", "zb_h1", {}, "selective", 0),
        ("llama with biases", "1f1b", {}, "full", 6),
    ]
]


@pytest.mark.parametrize("case", covering(), ids=str)
def test_pipelines_equal_it(four_ranks: Ranks, case: Case) -> None:
    check(four_ranks, case, case.mesh["pp"])


@pytest.mark.parametrize("case", TENSOR, ids=str)
def test_ranks_that_divide_matrices_equal_it(four_ranks: Ranks, case: Case) -> None:
    check(four_ranks, case, 4)


def check(four_ranks: Ranks, case: Case, ranks: int) -> None:
    expected = truth(case.name, case.layers, 4)
    pieces: dict[str, dict[int, Tensor]] = {}
    cuts: dict[str, int] = {}
    results = four_ranks.run(run_case, case, pickle.dumps(expected.values))[:ranks]
    for _, gradients, cut, at in results:
        cuts |= cut
        for name, gradient in gradients.items():
            where = pieces.setdefault(name, {})
            assert at not in where, "a parameter has two owners"
            where[at] = gradient
    found = {
        name: torch.cat([each[at] for at in sorted(each)], cuts[name]) if name in cuts else each[0]
        for name, each in pieces.items()
    }
    for loss, *_ in results:
        equal(expected, loss, found)
