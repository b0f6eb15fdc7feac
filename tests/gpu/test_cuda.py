"""On a CUDA device: kernels against plain attention, and ranks that share one device through host staging.

`pytest -m gpu`. The suite leaves these out; no number of the README rests on them unless it says so.
"""

from __future__ import annotations

import multiprocessing as mp
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import batch, plain_attention, plain_step

from helixpipe.model.attention import AttentionState, KeyValues, Rule, attend
from helixpipe.model.kernels import attention_backward, attention_forward
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Batch
from helixpipe.runtime.pipeline import Pipeline
from helixpipe.schedule.families import build_schedule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run on one with `make test-gpu`"),
]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}
SHAPE = ModelShape(layers=3, hidden=64, heads=2, ffn=128, vocabulary=32, tied=True)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_fused_attention(dtype: torch.dtype, causal: bool, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 90, 32) for heads in (4, kv_heads, kv_heads, 4)]  # 90: some kernels pad to 96
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = plain_attention(*leaves, causal)
    expected = [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad)]
    on = [t.to("cuda", dtype) for t in (q, k, v, grad)]
    found = [*attention_forward(*on[:3], causal)]
    found += attention_backward(on[3], *on[:3], *found, causal)
    for mine, theirs in zip(found, expected, strict=True):
        error = (mine.cpu().double() - theirs).norm() / theirs.norm()
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("segments", [(96,), (20, 50, 26)], ids=str)
@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 7), (False, 0), (False, 9)])
def test_documents(dtype: torch.dtype, segments: tuple[int, ...], causal: bool, window: int) -> None:
    """In half precision by one kernel of variable lengths, else tile by tile: what the CPU's tiles give in float64."""
    if len(segments) > 1 and not causal:
        return  # segments are causal
    rows = ((30, 1, 65), (96,), (7, 13, 60, 16))
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(3, 96, heads, 32, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]
    gradient = torch.randn(3, 96, 128, generator=generator, dtype=torch.float64)

    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        kept = Batch(3, segments, rows)
        past = KeyValues(lambda tensor: SimpleNamespace(tensor=tensor), batch=kept) if len(segments) > 1 else None
        pieces = list(zip(*(t.to(device, dtype).split(segments, 1) for t in whole), strict=True))
        leaves = [[t.clone().requires_grad_() for t in piece] for piece in pieces]
        states = [AttentionState(None, past, i, batch=kept) for i in range(len(segments))]
        made = [attend(*piece, Rule(causal, window), state) for piece, state in zip(leaves, states, strict=True)]
        gradients = gradient.to(device, dtype).split(segments, 1)
        order = range(len(segments) - 1, -1, -1)
        found = [torch.autograd.grad(made[i], leaves[i], gradients[i]) for i in order][::-1]
        joined = torch.cat(made, 1), *(torch.cat(each, 1) for each in zip(*found, strict=True))
        return [t.detach().cpu().double() for t in joined]

    for mine, theirs in zip(run("cuda", dtype), run("cpu", torch.float64), strict=True):
        assert (mine - theirs).norm() / theirs.norm() < TOLERANCE[dtype]


def _rank(rank: int, ranks: int, port: int, travel: str, recompute: str, results: Any) -> None:
    from helixpipe.model.decoder import Decoder

    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    schedule = build_schedule("helix", ranks=ranks, layers=SHAPE.layers, microbatches=4, travel=travel)
    pipeline = Pipeline(Decoder(SHAPE), schedule, device="cuda:0", dtype=torch.float64, recompute=recompute)
    loss = pipeline.step(*batch(SHAPE, 4, 24))
    gradients = {name: p.grad.cpu().numpy() for name, p in pipeline.parameters.items() if p.grad is not None}
    results.put((rank, loss, gradients))
    pipeline.close()
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("travel", "recompute"), [("none", "selective"), ("qkv", "full"), ("attention", "selective")])
def test_ranks_that_share_a_device(ranks: int, travel: str, recompute: str) -> None:
    loss, gradients = plain_step(SHAPE, *batch(SHAPE, 4, 24))
    context = mp.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, ranks, store.port, travel, recompute, results))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        answers = [results.get(timeout=120) for _ in processes]
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    found = {name: torch.from_numpy(g) for _, _, mine in answers for name, g in mine.items()}
    assert all(abs(each - loss) < 1e-10 for _, each, _ in answers)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() / gradient.norm() < 1e-8, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_segments(dtype: torch.dtype) -> None:
    """Of 20, 50 and 26 tokens: no kernel's own multiple."""
    from helixpipe.model.decoder import Decoder

    data = batch(SHAPE, 4, 96)
    loss, gradients = plain_step(SHAPE, *data)
    schedule = build_schedule("seq1f1b", ranks=1, layers=SHAPE.layers, microbatches=2, segments=3)
    pipeline = Pipeline(Decoder(SHAPE), schedule, device="cuda:0", dtype=dtype, segment_lengths=(20, 50, 26))
    assert abs(pipeline.step(*data) - loss) < TOLERANCE[dtype]
    for name, parameter in pipeline.parameters.items():
        assert parameter.grad is not None
        error = (parameter.grad.cpu().double() - gradients[name]).norm() / gradients[name].norm()
        assert error < TOLERANCE[dtype], name
    pipeline.close()
