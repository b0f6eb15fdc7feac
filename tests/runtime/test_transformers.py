"""Hugging Face's own models with the same weights, against every family: loss and every gradient, in float64.

Of transformers' models GPT-2 computes in the precision asked for. The others compute RMSNorm, rotary tables and the
softmax in float32 whatever the model's own, and so equal plain autograd to float32's last bits and no better. Pipelines
are held to what the same code computes where each float32 it asks for is float64 (`Wide`): that agrees as GPT-2 does.
"""

from __future__ import annotations

import functools
import os
import pickle
import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import batch, plain_gradients
from ranks import Ranks, mesh_of
from torch import Tensor
from values import Given, initial_values
from wide import Wide

import helixpipe as hp
from helixpipe.schedule.families import FAMILIES, options

BASE: dict[str, Any] = {"hidden": 16, "heads": 4, "ffn": 24, "vocabulary": 19}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"kv_heads": 2, "rope_base": 5e5},
    "qwen2": {"kv_heads": 2, "rope_base": 1e6, "norm_eps": 1e-6, "qkv_bias": True, "tied": True},
    "qwen3": {"kv_heads": 1, "rope_base": 1e6, "norm_eps": 1e-6, "qk_norm": True, "head_dim": 6},
    "gpt2": {
        "norm": "layer", "positions": "learned", "context": 16, "mlp": "gelu", "qkv_bias": True, "bias": True,
        "tied": True,
    },
}  # fmt: skip
# of the loss, absolute; of each gradient's norm, relative
EXACT = (1e-12, 1e-9)
FLOAT32 = (1e-6, 5e-6)
LENGTH = 12
LENGTHS = {1: None, 2: (7, 5), 3: (6, 1, 5), 5: (4, 3, 2, 2, 1)}

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    architecture: str
    family: str
    ranks: int
    options: dict[str, Any] = field(default_factory=dict)
    recompute: str = "selective"
    chunk: int = 0

    def __str__(self) -> str:
        words = [self.architecture, self.family, f"p{self.ranks}", self.recompute, f"chunk{self.chunk}"]
        return "-".join(words + [f"{name}={value}" for name, value in self.options.items()])

    @property
    def layers(self) -> int:
        """Two stages on each rank can have one, and no even share where ranks are odd."""
        return 2 * self.ranks + self.ranks % 2

    @property
    def microbatches(self) -> int:
        return 6 if self.family == "dualpipe_v" else 4


# what transformers has


def shape_of(architecture: str, layers: int) -> hp.ModelShape:
    return hp.ModelShape(layers=layers, **BASE, **ARCHITECTURES[architecture])


def hugging_face() -> Any:
    """The library. Late: it is slow, and ranks import this file and need none of it."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read at import; nothing here would be fetched
    import transformers

    return transformers


def with_random_values(model: Any, spread: float = 0.2) -> Any:
    """The model, evaluating: some drop out otherwise. No norm is 1 and no bias 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * drawn if parameter.dim() == 1 else spread * drawn)
    return model.eval()


def transformer(architecture: str, layers: int) -> Any:
    """Its own model of our shape in float64, with random values."""
    transformers, shape = hugging_face(), shape_of(architecture, layers)
    if architecture == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=shape.vocabulary, n_positions=shape.context, n_embd=shape.hidden, n_layer=layers,
            n_head=shape.heads, n_inner=shape.ffn, layer_norm_epsilon=shape.norm_eps, activation_function="gelu",
            tie_word_embeddings=shape.tied, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
    else:
        kind = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}[architecture]
        config = getattr(transformers, kind)(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
            intermediate_size=shape.ffn, rms_norm_eps=shape.norm_eps, hidden_act="silu", max_position_embeddings=16,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_base}, tie_word_embeddings=shape.tied,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64)
    return with_random_values(model)


# its name -> ours
LLAMA_NAMES = {
    r"model\.embed_tokens": "embed.tokens",
    r"model\.layers\.(\d+)\.input_layernorm": r"layers.\1.norm",
    r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj": r"layers.\1.qkv.\2",
    r"model\.layers\.(\d+)\.self_attn\.([qk])_norm": r"layers.\1.qkv.\2_norm",
    r"model\.layers\.(\d+)\.self_attn\.o_proj": r"layers.\1.proj.o",
    r"model\.layers\.(\d+)\.post_attention_layernorm": r"layers.\1.mlp.norm",
    r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj": r"layers.\1.mlp.\2",
    r"model\.norm": "head.norm",
    r"lm_head": "head.output",
}
GPT2_NAMES = {
    r"transformer\.wte": "embed.tokens",
    r"transformer\.wpe": "embed.positions",
    r"transformer\.h\.(\d+)\.ln_1": r"layers.\1.norm",
    r"transformer\.h\.(\d+)\.attn\.c_attn": r"layers.\1.qkv",
    r"transformer\.h\.(\d+)\.attn\.c_proj": r"layers.\1.proj.o",
    r"transformer\.h\.(\d+)\.ln_2": r"layers.\1.mlp.norm",
    r"transformer\.h\.(\d+)\.mlp\.c_fc": r"layers.\1.mlp.up",
    r"transformer\.h\.(\d+)\.mlp\.c_proj": r"layers.\1.mlp.down",
    r"transformer\.ln_f": "head.norm",
}


def ours(architecture: str, theirs: Named) -> Named:
    """Values or gradients under our names, in our form. GPT-2's linear layers are [in, out], and q, k and v are one."""
    table = GPT2_NAMES if architecture == "gpt2" else LLAMA_NAMES
    found: Named = {}
    for name, tensor in theirs.items():
        module, kind = name.rsplit(".", 1)
        (mine,) = [re.sub(f"{pattern}$", to, module) for pattern, to in table.items() if re.fullmatch(pattern, module)]
        if "c_" in module and kind == "weight":
            tensor = tensor.T
        if module.endswith("c_attn"):
            found |= {f"{mine}.{each}.{kind}": t for each, t in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            found[f"{mine}.{kind}"] = tensor
    return found


@dataclass(frozen=True)
class Truth:
    loss: float
    values: Named
    gradients: Named


@functools.cache
def truth(architecture: str, layers: int, sequences: int, wide: bool = True) -> Truth:
    """From transformers' own model: its loss, parameters and gradients under our names."""
    hugging_face()  # before float32 means something else
    tokens, targets = batch(shape_of(architecture, layers), sequences, LENGTH)
    with Wide() if wide else nullcontext():
        model = transformer(architecture, layers)
        logits = model(input_ids=tokens, use_cache=False).logits
        # its own loss would first make the logits float32
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
    parameters = dict(model.named_parameters())
    return Truth(
        float(loss.detach()),
        ours(architecture, {name: p.detach() for name, p in parameters.items()}),
        ours(architecture, {name: p.grad for name, p in parameters.items()}),
    )


# what must equal it


def equal(expected: Truth, loss: float, gradients: Named, tolerance: tuple[float, float] = EXACT) -> None:
    assert abs(loss - expected.loss) < tolerance[0]
    assert gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        scale = gradient.norm()
        if name.endswith("qkv.k.bias") and "embed.positions.weight" in gradients:
            # unrotated, a constant in all keys adds the same to all scores of a query: softmax does not see it
            scale = expected.gradients[name.replace("bias", "weight")].norm()
            assert gradient.norm() < 1e-12 * scale
        error = (gradients[name] - gradient).norm() / scale
        assert error < tolerance[1], f"{name}: {error:.1e}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_number_has_a_place(architecture: str) -> None:
    """Names and sizes are ours, and nothing of theirs is lost."""
    values = truth(architecture, 3, 4).values
    expected = initial_values(shape_of(architecture, 3))
    assert {name: value.shape for name, value in values.items()} == {name: v.shape for name, v in expected.items()}
    theirs = sorted(number for p in transformer(architecture, 3).parameters() for number in p.flatten().tolist())
    assert sorted(number for value in values.values() for number in value.flatten().tolist()) == theirs


@pytest.mark.parametrize("layers", [3, 7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_autograd_equals_it(architecture: str, layers: int) -> None:
    """The oracle of all other tests: exactly with wide intermediates, and to float32 as transformers is."""
    shape = shape_of(architecture, layers)
    for wide in (True, False):
        expected = truth(architecture, layers, 4, wide)
        found = plain_gradients(shape, expected.values, *batch(shape, 4, LENGTH))
        equal(expected, *found, EXACT if wide or architecture == "gpt2" else FLOAT32)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_wide_changes_the_last_bits_of_float32(architecture: str) -> None:
    """Once it changes nothing transformers no longer goes through float32, and `Wide` can go."""
    wide, as_it_is = (truth(architecture, 3, 4, each).gradients for each in (True, False))
    errors = [float((as_it_is[name] - gradient).norm() / gradient.norm()) for name, gradient in wide.items()]
    assert EXACT[1] < max(errors) < FLOAT32[1]


def run_case(case: Case, values: bytes) -> tuple[float, Named] | None:
    """On a rank of the four: this rank's loss and gradients; None on the ranks the case does not use."""
    mesh = mesh_of(case.ranks)
    if mesh is None:
        return None
    shape = shape_of(case.architecture, case.layers)
    schedule = hp.build_schedule(
        case.family, ranks=case.ranks, layers=case.layers, microbatches=case.microbatches, **case.options
    )
    pipeline = hp.Pipeline(
        Given(shape, pickle.loads(values), case.chunk), schedule, mesh, dtype=torch.float64, recompute=case.recompute,
        timeout_s=30, segment_lengths=LENGTHS[schedule.segments],
    )  # fmt: skip
    loss = pipeline.step(*batch(shape, case.microbatches, LENGTH))
    pipeline.close()
    return loss, {name: p.grad for name, p in pipeline.parameters.items()}


RECOMPUTE = ("none", "full", "selective")
TRAVEL = ("none", "qkv", "attention")


def covering() -> list[Case]:
    """Every family on every architecture and on one to three ranks; the rest in turn."""
    variants: list[tuple[str, dict[str, Any]]] = [(family, {}) for family in FAMILIES if family != "helix"]
    variants += [("helix", {"travel": travel}) for travel in TRAVEL]
    cases = []
    for i, (family, given) in enumerate(variants):
        known = options(family)
        for j, architecture in enumerate(ARCHITECTURES):
            more = {"segments": (2, 3, 5)[(2 * i + j) % 3]} if "segments" in known else {}
            more |= {"stages_per_rank": 2} if "stages_per_rank" in known else {}
            more |= {"folds": 1 + j % 2} if "folds" in known else {}
            recompute, chunk = RECOMPUTE[(i + i // 3 + 2 * j) % 3], (0, 5)[(i + j) % 2]
            cases.append(Case(architecture, family, 1 + (i + j) % 3, given | more, recompute, chunk))
    return cases


def variant(case: Case) -> tuple[str, str | None]:
    return case.family, case.options.get("travel")


def test_what_the_cases_cover() -> None:
    cases = covering()
    wanted = {(family, travel) for family in FAMILIES for travel in (TRAVEL if family == "helix" else (None,))}
    assert {variant(case) for case in cases} == wanted
    for each in wanted:
        mine = [case for case in cases if variant(case) == each]
        assert {case.architecture for case in mine} == set(ARCHITECTURES)
        assert {case.ranks for case in mine} == {1, 2, 3}
        assert {case.recompute for case in mine} == set(RECOMPUTE)
    for architecture in ARCHITECTURES:
        mine = [case for case in cases if case.architecture == architecture]
        assert {case.ranks for case in mine} == {1, 2, 3}
        assert {case.options.get("segments") for case in mine} == {None, 2, 3, 5}


@pytest.mark.parametrize("case", covering(), ids=str)
def test_pipelines_equal_it(four_ranks: Ranks, case: Case) -> None:
    expected = truth(case.architecture, case.layers, case.microbatches)
    found: Named = {}
    # as bytes: a queue would pass every tensor as an open file
    results = four_ranks.run(run_case, case, pickle.dumps(expected.values))[: case.ranks]
    for _, gradients in results:
        assert not found.keys() & gradients.keys(), "a parameter has two owners"
        found |= gradients
    for loss, _ in results:
        equal(expected, loss, found)
