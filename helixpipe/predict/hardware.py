"""Accelerators and links, as data with their sources.

Rates are the makers' own, dense, for bfloat16 and for IEEE float32, which torch multiplies in by default (TF32 is
not meant); what kernels reach of them are the stated efficiencies. Of attention each is of one kernel, with its source:
training calls torch's own, which is FlashAttention 2. Where no measurement is known an efficiency is a common value of
well-tuned training, and it is said. A profile of the machine itself (`predict.profile`) is better than any of this.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from helixpipe.errors import ConfigError, nearest


@dataclass(frozen=True)
class AttentionKernel:
    """What a fused attention reaches of an accelerator's rate; half of what is skipped by causality is not counted."""

    name: str
    forward: float
    backward: float
    source: str

    def __str__(self) -> str:
        return f"{self.name} {self.forward:.2f} of the peak forward and {self.backward:.2f} backward ({self.source})"


FLASH_2 = "FlashAttention 2"
_MADE_UP = "assumed, no public figure is known"
# head size 128 at 16k tokens, forward causal and backward, over 989 TFLOPS
_FLASH_3_PAPER = "arXiv 2407.08608, figures 5 and 6"
_HOPPER = (
    AttentionKernel("FlashAttention 3", 0.62, 0.57, _FLASH_3_PAPER),
    AttentionKernel("cuDNN", 0.55, 0.52, _FLASH_3_PAPER),
)
# 0.50 to 0.73 forward and up to 0.63 backward, by head size and mask
_FLASH_2_PAPER = "within what arXiv 2307.08691 measured"
# forward at head size 128, 330 TFLOPS; backward at head size 64, 334 TFLOPS; both of 16k tokens, over 2250
_ON_B200 = "meta-pytorch/tritonbench pull 171; Dao-AILab/flash-attention issue 1589"


@dataclass(frozen=True)
class Accelerator:
    """One device: what it computes, how fast it reads its memory, how much of it there is."""

    name: str
    flops_per_s: float
    """Dense matrix FLOPs at bfloat16, multiply and add counted as two."""
    memory_bytes: float
    memory_bytes_per_s: float
    source: str
    matmul_efficiency: float = 0.70
    """The share of `flops_per_s` that large matrix products reach."""
    attention_efficiency: float = 0.55
    """The same of a fused attention forward; half of what is skipped by causality is not counted."""
    attention_backward_efficiency: float = 0.45
    memory_efficiency: float = 0.80
    """The share of `memory_bytes_per_s` that norms, activations and residual adds reach."""
    launch_s: float = 20e-6
    """What starting a part costs, whatever its size: about five kernels of 4 us. Short segments pay it most."""
    float32_flops_per_s: float | None = None
    """The same at IEEE float32. Of precisions without a rate nothing is predicted."""
    float64_flops_per_s: float | None = None
    link: str = "infiniband"
    """What joins pipeline ranks where no link is named: one of LINKS."""
    tensor_link: str = "nvlink"
    """The same of the accelerators of one rank, which are in one node."""
    device: str = "cuda"
    """Whose kernels it runs: see `Keeping.device`."""
    only_ratios: bool = False
    """Whether it is no machine: its seconds mean something only beside one another."""
    attention_kernel: str = "the fused kernel of torch"
    """Whose the efficiencies of attention are: the one that training calls in half precision."""
    attention_source: str = _MADE_UP
    other_attention: tuple[AttentionKernel, ...] = ()
    """Kernels that training does not call, and what they reach."""

    def rate(self, element_bytes: int) -> float:
        """FLOPs a second on elements of so many bytes; raises ConfigError where none is stated."""
        rates = {2: self.flops_per_s, 4: self.float32_flops_per_s, 8: self.float64_flops_per_s}
        found = rates.get(element_bytes)
        if found is None:
            dtype = f"float{8 * element_bytes}"
            raise ConfigError(
                f"{dtype}: {self.name} has no rate for it; measure with helixpipe profile --dtype {dtype}, or use ideal"
            )
        return found

    @property
    def attention(self) -> AttentionKernel:
        """The kernel that is assumed."""
        efficiencies = self.attention_efficiency, self.attention_backward_efficiency
        return AttentionKernel(self.attention_kernel, *efficiencies, self.attention_source)


Communicators = Literal["direction", "pair"]
"""Whether two ranks' messages to each other and back travel at once, or take turns: of a backend that matches by order, NCCL,
a communicator for each direction or one for both."""


@dataclass(frozen=True)
class Link:
    """What carries messages between two ranks, one at a time in each direction, or one at a time in all."""

    name: str
    bytes_per_s: float
    latency_s: float
    source: str
    communicators: Communicators = "direction"
    host_s_per_byte: float = 0.0
    """What a byte takes, at each end, of the time in which the rank would compute: of ranks whose own cores copy messages."""

    def seconds(self, nbytes: float) -> float:
        """From the moment both ends are ready until it is there."""
        return self.latency_s + nbytes / self.bytes_per_s


_TERA, _GIGA, _GIB = 1e12, 1e9, 2.0**30

ACCELERATORS: dict[str, Accelerator] = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator(
            "ideal", _TERA, math.inf, math.inf, "every FLOP at one rate and nothing else: only ratios speak",
            1.0, 1.0, 1.0, 1.0, 0.0,
            float32_flops_per_s=_TERA, float64_flops_per_s=_TERA, link="free", tensor_link="free", only_ratios=True,
        ),
        Accelerator(
            "laptop-core", 60e9, 8 * _GIB, 10 * _GIGA,
            "one AVX2 core at float32; an order of magnitude, measure yours with helixpipe profile", 0.8, 0.35, 0.35, 0.7, 100e-6,
            float32_flops_per_s=60e9, link="loopback", tensor_link="loopback", device="cpu",
        ),
        Accelerator(
            "h20", 148 * _TERA, 96 * _GIGA, 4000 * _GIGA,
            "NVIDIA H20, public specifications: 148 TFLOPS, 44 at float32, 96 GB HBM3 at 4.0 TB/s; slow to compute for "
            "its memory, so that kernels come closer to its peak", 0.85, 0.75, 0.65, float32_flops_per_s=44 * _TERA,
            attention_kernel=FLASH_2,
        ),
        Accelerator(
            "a100", 312 * _TERA, 80 * _GIGA, 2039 * _GIGA,
            "NVIDIA A100 80GB SXM data sheet: 312 TFLOPS, 19.5 at float32, 80 GB HBM2e at 2039 GB/s", 0.70, 0.60, 0.50,
            float32_flops_per_s=19.5 * _TERA, tensor_link="nvlink-a100",
            attention_kernel=FLASH_2, attention_source=_FLASH_2_PAPER,
        ),
        Accelerator(
            "a800", 312 * _TERA, 80 * _GIGA, 2039 * _GIGA,
            "NVIDIA A800 80GB SXM: an A100 with NVLink at 400 GB/s", 0.70, 0.60, 0.50,
            float32_flops_per_s=19.5 * _TERA, tensor_link="nvlink-a800",
            attention_kernel=FLASH_2, attention_source=_FLASH_2_PAPER,
        ),
        Accelerator(
            "h100", 989 * _TERA, 80 * _GIGA, 3350 * _GIGA,
            "NVIDIA H100 SXM data sheet: 989 TFLOPS dense, 67 at float32, 80 GB HBM3 at 3.35 TB/s", 0.65, 0.34, 0.33,
            float32_flops_per_s=67 * _TERA,
            attention_kernel=FLASH_2, attention_source=_FLASH_3_PAPER, other_attention=_HOPPER,
        ),
        Accelerator(
            "h200", 989 * _TERA, 141 * _GIGA, 4800 * _GIGA,
            "NVIDIA H200 SXM data sheet: 989 TFLOPS dense, 67 at float32, 141 GB HBM3e at 4.8 TB/s", 0.65, 0.34, 0.33,
            float32_flops_per_s=67 * _TERA,
            attention_kernel=FLASH_2, attention_source=f"{_FLASH_3_PAPER}, of H100", other_attention=_HOPPER,
        ),
        Accelerator(
            "b200", 2250 * _TERA, 192 * _GIGA, 8000 * _GIGA,
            "NVIDIA B200 (HGX) data sheet: 2.25 PFLOPS dense, 75 TFLOPS at float32, 192 GB HBM3e at 8 TB/s", 0.60, 0.15, 0.15,
            float32_flops_per_s=75 * _TERA, tensor_link="nvlink-b200",
            attention_kernel=FLASH_2, attention_source=_ON_B200,
        ),
    )
}  # fmt: skip

LINKS: dict[str, Link] = {
    link.name: link
    for link in (
        Link("free", math.inf, 0.0, "messages take no time"),
        Link("nvlink-a800", 160 * _GIGA, 5e-6, "400 GB/s both ways together, 200 one way; 0.8 of it reached"),
        Link("nvlink-a100", 240 * _GIGA, 5e-6, "NVLink 3: 600 GB/s both ways, 300 one way; 0.8 of it reached"),
        Link("nvlink", 360 * _GIGA, 5e-6, "NVLink 4 (H20, H100, H200): 900 GB/s both ways, 450 one way; 0.8 reached"),
        Link("nvlink-b200", 720 * _GIGA, 5e-6, "NVLink 5: 1800 GB/s both ways, 900 one way; 0.8 of it reached"),
        Link("infiniband", 45 * _GIGA, 10e-6, "NDR, 400 Gbit/s a rank, 0.9 of it reached (NVIDIA/nccl-tests issue 290: 46 to 48)"),
        Link("infiniband-200", 22.5 * _GIGA, 10e-6, "HDR, 200 Gbit/s a rank, 0.9 of it reached"),
        Link("ethernet", 11 * _GIGA, 30e-6, "100 Gbit/s a rank, 0.9 of it reached"),
        Link("loopback", 1.5 * _GIGA, 100e-6, "gloo over one machine's loopback; an order of magnitude"),
    )
}  # fmt: skip


def named_accelerator(name: str) -> Accelerator:
    """Raises ConfigError that names the nearest."""
    if name not in ACCELERATORS:
        raise ConfigError(f"hardware: '{name}' is not known{nearest(name, ACCELERATORS)}")
    return ACCELERATORS[name]


def accelerator_of_device(name: str) -> Accelerator | None:
    """The accelerator that a device says it is (`torch.cuda.get_device_name`); None where its rates are not known.

    Rates are those of SXM boards: others of the same chip (PCIe, NVL), and shares of one (MIG), have other rates.
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if words & {"pcie", "nvl", "mig"}:
        return None
    devices = (each for each in ACCELERATORS.values() if each.device == "cuda" and not each.only_ratios)
    return next((each for each in devices if each.name in words), None)


def named_link(name: str, key: str = "link") -> Link:
    """Raises ConfigError that names the nearest, and `key` as where it was asked for."""
    if name not in LINKS:
        raise ConfigError(f"{key}: '{name}' is not known{nearest(name, LINKS)}")
    return LINKS[name]


def check_communicators(name: str, key: str = "communicators") -> None:
    """Raises ConfigError for what is none of Communicators."""
    if name not in get_args(Communicators):
        raise ConfigError(f"{key}: '{name}' is not known; known: {', '.join(get_args(Communicators))}")
