"""Trials of somebody's modules: FLOPs and bytes without data are those of a real run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helixpipe.errors import ConfigError
from helixpipe.model.trial import Figures, Given, Trials, _measured, storage_of

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")
H = 16


class Causal(nn.Module):
    """Attention, causal or not, of two heads."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.qkv, self.causal = nn.Linear(H, 3 * H, bias=False), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)


class NeedsValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if float(x.detach().square().sum()) >= 0 else x


class Counting(nn.Module):
    """It keeps count in a buffer, and has a mask that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(H)
        self.mask = torch.ones(H)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.mT).mT * self.mask


class First(nn.Module):
    """Of a recurrent layer's outputs, the sequence."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]  # type: ignore[no-any-return]


def tried(module: nn.Module, sequences: int, tokens: int, is_value: bool = True, element_bytes: int = 4) -> Figures:
    given = Given((sequences, tokens, H) if is_value else (sequences, tokens), is_value)
    return Trials([module], ["it"]).figures(0, (given,), element_bytes)


def really(module: nn.Module, sequences: int, tokens: int) -> Figures:
    """The same of a run on real tensors."""
    given = [Given((sequences, tokens, H), True)]
    with torch.backends.mkldnn.flags(enabled=False):
        return _measured(copy.deepcopy(module), given, torch.float32, torch.device("cpu"), "it")


def test_a_linear_layer_is_counted_to_the_last_byte() -> None:
    figures = tried(nn.Linear(H, H, bias=False), 2, 8)
    assert figures == Figures(
        made=(2, 8, H),
        forward_flops=2 * 16 * H * H,
        backward_flops=4 * 16 * H * H,
        moved_elements=0.0,
        saves_input=True,
        saves_output=False,
        inside_bytes=0,
        plain_workspace=0,
        graph_workspace=0,
        backward_workspace=4 * (16 * H + H * H),  # the input's gradient, and the weight's before it is added
    )
    assert tried(nn.Linear(H, H, bias=False), 2, 8, element_bytes=8).backward_workspace == 8 * (16 * H + H * H)


def test_attention_is_quadratic_and_half_of_it_where_it_is_causal() -> None:
    def attended(tokens: int, causal: bool) -> float:
        figures = tried(Causal(causal), 2, tokens)
        assert figures.inside_bytes < 40 * 2 * tokens * H, "a fused kernel keeps no scores"
        return figures.forward_flops - 2 * 2 * tokens * 3 * H * H

    assert attended(64, causal=False) == 4 * 2 * 64 * 64 * H
    assert attended(64, causal=True) == attended(64, causal=False) / 2
    assert attended(256, causal=True) == 16 * attended(64, causal=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(H, 3 * H), nn.Tanh(), nn.Linear(3 * H, H)),
        lambda: nn.Sequential(nn.LayerNorm(H), nn.GELU(), nn.Dropout(0.1)),
        lambda: nn.TransformerEncoderLayer(H, 2, 24, 0.0, batch_first=True),
        Counting,
        Causal,
    ],
)
def test_a_trial_without_data_is_a_real_run(make: Callable[[], nn.Module]) -> None:
    module = make()
    assert tried(module, 3, 32) == really(module, 3, 32)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("more", [{}, {"num_layers": 2, "bidirectional": True, "hidden_size": H // 2}])
def test_a_recurrent_layer_is_tried_at_once(kind: type[nn.RNNBase], more: dict[str, Any]) -> None:
    """Its steps, one by one, would be tried for minutes. FLOPs are theirs, bytes nearly."""
    module = First(kind(**({"input_size": H, "hidden_size": H, "batch_first": True} | more)))
    figures, real = tried(module, 2, 32), really(module, 2, 32)
    assert figures.made == real.made
    assert figures.forward_flops == real.forward_flops
    assert figures.backward_flops == pytest.approx(
        real.backward_flops, rel=0.04
    )  # a first step has no state to go back to
    assert figures.inside_bytes == pytest.approx(real.inside_bytes, rel=0.5)
    long = tried(module, 1, 1 << 16)
    assert long.forward_flops == (1 << 15) / 32 * figures.forward_flops
    assert module(torch.zeros(1, 3, H)).shape == (1, 3, H), "the module given still runs, for real"


def test_what_is_given_stays_as_it_is() -> None:
    module = Counting()
    before = copy.deepcopy(module.state_dict())
    trials = Trials([module], ["it"])
    for tokens in (8, 16):
        trials.figures(0, (Given((2, tokens, H), True),), 4)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_module_that_needs_values_is_run_on_some() -> None:
    module, same = NeedsValues(), nn.Sequential(nn.Linear(H, H), nn.Dropout(0.5))
    state = torch.get_rng_state()
    assert tried(module, 2, 8).forward_flops == tried(same, 2, 8).forward_flops == 2 * 16 * H * H
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are its own"


def test_tokens_are_no_activations() -> None:
    figures = tried(nn.Embedding(5, H), 2, 8, is_value=False)
    assert (figures.saves_input, figures.inside_bytes, figures.backward_flops) == (False, 0, 0.0)


class Broken(nn.Module):
    def __init__(self, out: object) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor) -> object:
        if isinstance(self.out, Exception):
            raise self.out
        return self.out


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.GRU(H, H), "it gave tuple of 2; give one tensor of floats: wrap it in a module that returns that alone"),
        (Broken(None), "it gave NoneType; give one tensor of floats: wrap it in a module that returns that alone"),
        (Broken(torch.ones(2, dtype=torch.int64)), "it gave int64; give one tensor of floats: wrap it in a module that returns that alone"),
        (Broken(ValueError("no\nway")), "it failed on [2, 8, 16] in float32: no way"),
        (Broken(ValueError()), "it failed on [2, 8, 16] in float32: ValueError"),
    ],
)  # fmt: skip
def test_what_fails_is_told(module: nn.Module, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        tried(module, 2, 8)
    assert str(error.value) == said


def test_a_mistake_of_sizes_is_told_as_torch_tells_it() -> None:
    with pytest.raises(
        ConfigError, match=r"^it failed on \[2, 8, 16\] in float32: .*mat1 and mat2 shapes cannot be multiplied"
    ):
        tried(nn.Linear(H + 1, H), 2, 8)


def test_storages_are_told_apart_without_addresses() -> None:
    x = torch.empty(4, device="meta")
    assert storage_of(x) == storage_of(x[1:])
    assert storage_of(x) != storage_of(x + 1)
