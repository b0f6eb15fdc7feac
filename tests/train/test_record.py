"""Records: what a step gave and cost, as numbers with the same keys always, and as fields of a line."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from helixpipe.config_text import build_config
from helixpipe.predict.hardware import accelerator_of_device
from helixpipe.predict.timeline import MemoryPoint, Span, Timeline
from helixpipe.schedule.action import Action
from helixpipe.train.device import peak_flops_per_s, peak_memory
from helixpipe.train.record import Beside, Metrics, Ranks, StepRecord, Stopwatch, scalars

TIMELINE = Timeline(
    ((Span(Action.parse("0F0"), 0.0, 1.0),), (Span(Action.parse("1F0"), 1.0, 2.0),)),
    ((MemoryPoint(0.0, 3 << 20),), (MemoryPoint(1.0, 5 << 20),)),
)
CONFIG = build_config({"mesh": {"dp": 2}})
PLAIN = StepRecord(7, 2.5, 0.75, 1e-3, 2.0, TIMELINE.totals, 3e9)
FULL = PLAIN._replace(
    beside=Beside(0.5, 3.25, 1.5), ranks=Ranks(3, 1.8, "rank 3 (pp 1, dp 1)", 10.0 * 2**30, 12.5 * 2**30)
)


def test_a_cpu_has_no_peak_and_no_allocator() -> None:
    assert peak_flops_per_s("cpu", 4) is None
    assert peak_memory("cpu") == (0.0, 0.0)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA H20", "h20"), ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA A800-SXM4-80GB", "a800"),
        ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GH200 480GB", None), ("Tesla V100-SXM2-16GB", None), ("an ideal laptop-core", None), ("", None),
    ],
)  # fmt: skip
def test_an_accelerator_is_known_by_the_name_that_its_device_has(said: str, name: str | None) -> None:
    found = accelerator_of_device(said)
    assert (found.name if found else None) == name


def test_numbers_have_the_same_keys_whatever_is_known() -> None:
    plain, full = (Metrics.of(each, CONFIG, peak).numbers() for each, peak in ((PLAIN, None), (FULL, 1e10)))
    assert plain.keys() == full.keys()
    assert plain == {
        "step": 7, "loss": 2.5, "grad_norm": 0.75, "learning_rate": 0.001, "tokens_per_s": 4096.0,
        "tokens_per_s_per_accelerator": 1024.0, "model_flops_per_s": 1_500_000_000, "mfu": None, "step_s": 2.0,
        "data_s": 0.0, "checkpoint_s": 0.0, "evaluation_s": 0.0, "bubble_ratio": 0.5,
        "peak_activation_bytes": [3 << 20, 5 << 20], "peak_allocated_bytes": None, "peak_reserved_bytes": None,
        "slowest_rank": 0, "slowest_rank_ratio": 1.0,
    }  # fmt: skip
    assert full["mfu"] == 0.0375  # 3e9 FLOPs in 2 s of 4 accelerators at 1e10 a second
    assert (full["peak_allocated_bytes"], full["peak_reserved_bytes"]) == (10 << 30, 25 << 29)
    assert (full["slowest_rank"], full["slowest_rank_ratio"]) == (3, 1.8)
    assert json.loads(json.dumps(full)) == full


def test_a_line_leaves_out_what_is_not_known_or_not_worth_a_word() -> None:
    assert Metrics.of(PLAIN, CONFIG, None).fields() == [
        "loss 2.5000", "grad norm 0.750", "4,096 tokens/s", "bubble 50.0%", "peak activations 5.0 MiB",
        "1,024 tokens/s per accelerator",
    ]  # fmt: skip
    assert Metrics.of(FULL, CONFIG, 1e10).fields() == [
        "loss 2.5000", "grad norm 0.750", "4,096 tokens/s", "MFU 3.8%", "bubble 50.0%", "data 0.50 s",
        "peak activations 5.0 MiB", "allocated 10.0 GiB of 12.5 GiB", "1,024 tokens/s per accelerator", "evaluation 1.50 s",
        "checkpoint 3.25 s",
    ]  # fmt: skip
    alone = build_config({"schedule": {"ranks": 1}})
    assert "2,048 tokens/s" in Metrics.of(PLAIN, alone, None).fields()
    assert not any("per accelerator" in field for field in Metrics.of(PLAIN, alone, None).fields())


def test_scalars_are_what_has_a_curve() -> None:
    found: dict[str, Any] = scalars(Metrics.of(PLAIN, CONFIG, None).numbers())
    assert found["peak_activation_bytes"] == 5 << 20
    assert not {"step", "slowest_rank", "mfu", "peak_allocated_bytes"} & found.keys()
    assert scalars({"step": 3, "held_out_loss": 2.0, "held_out_loss_by_position": [3.0, 2.0]}) == {"held_out_loss": 2.0}


def test_among_all_ranks_the_slowest_and_the_fullest_stand_out() -> None:
    found = Ranks.of([[1.0, 5.0, 6.0], [1.5, 3.0, 9.0], [1.5, 1.0, 1.0]], "rank {}".format)
    assert found == Ranks(1, 1.5, "rank 1", 5.0, 9.0)


def test_a_stopwatch_adds_up_until_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch()
    with watch.on("data_s"):
        pass
    with watch.on("data_s"), watch.on("checkpoint_s"):
        pass
    with pytest.raises(ValueError, match="gone"), watch.on("evaluation_s"):
        raise ValueError("gone")
    assert watch.taken() == Beside(1 + 3, 1, 1)
    assert watch.taken() == Beside()
