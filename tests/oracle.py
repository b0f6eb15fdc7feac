"""Plain autograd on one process: what every pipeline must equal. Shares only the modules' parameters with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helixpipe.model.decoder import Decoder
from helixpipe.parts.part import Part, chain
from helixpipe.parts.shape import ModelShape


def plain_step(
    shape: ModelShape, tokens: Tensor, targets: Tensor, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[float, dict[str, Tensor]]:
    """Mean loss and the gradient of every parameter, by full name."""
    decoder = Decoder(shape, seed)
    modules = {part: decoder.part(part).to(dtype) for part in chain(shape.layers)}
    parameters: dict[str, nn.Parameter] = {}
    for part, module in modules.items():
        for local, parameter in module.named_parameters():
            parameters.setdefault(shape.parameter_name(part, local), parameter)
    x = modules[Part("embed", 0)](tokens, 0)
    for layer in range(shape.layers):
        n = modules[Part("norm", layer)](x)
        q, k, v = (t.transpose(1, 2) for t in modules[Part("qkv", layer)](n, 0))
        scores = q @ k.repeat_interleave(shape.heads // shape.kv_heads, 1).mT * shape.head_dim**-0.5
        if shape.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
        o = scores.softmax(-1) @ v.repeat_interleave(shape.heads // shape.kv_heads, 1)
        y = modules[Part("proj", layer)](o.transpose(1, 2).flatten(2), x)
        x = modules[Part("mlp", layer)].whole(y)
    head = modules[Part("head", shape.layers)]
    table = parameters["embed.tokens.weight"] if shape.tied else head.output.weight
    logits = F.linear(head.norm(x), table).flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=-100)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return float(loss.detach()), dict(zip(parameters, gradients, strict=True))


def batch(shape: ModelShape, sequences: int, length: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random tokens and targets, a few of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(shape.vocabulary, (sequences, length), generator=generator)
    targets = torch.randint(shape.vocabulary, (sequences, length), generator=generator)
    targets[:, length // 3] = -100
    return tokens, targets
