"""What the authors of Seq1F1B published (arXiv 2406.03488; repository github.com/thunlp/Seq1F1B): data, and where each stands."""

from __future__ import annotations

from dataclasses import dataclass

from helixpipe.parts.shape import ModelShape
from helixpipe.parts.shapes import named_shape

METHODS = ("1F1B", "1F1B-I", "Seq1F1B", "Seq1F1B-I")
OUT = None  # out of memory

HEADLINE = {"source": "arXiv 2406.03488, abstract", "throughput": 1.14, "memory": 0.5}
SPEED_SOURCE = (
    "arXiv 2406.03488, the table for 7B on 32 GPUs; "
    "m = 16 as in github.com/thunlp/Seq1F1B, picture/32x7b zhihu_throughput.tex"
)
TOKENS_PER_S: dict[tuple[int, int], tuple[float | None, ...]] = {
    (32768, 8): (48189, 52964, 53485, 47232),
    (32768, 16): (55333, 56304, 55765, 46195),
    (65536, 8): (37343, 41677, 43297, 40908),
    (65536, 16): (43063, 44712, 33367, 40990),
    (131072, 8): (OUT, OUT, 30392, 30023),
    (131072, 16): (OUT, OUT, 31584, 30362),
}

LAYOUT_SOURCE = "github.com/thunlp/Seq1F1B, exp.sh (layers, hidden, heads; p and tensor parallel of 30B); see README.md"
FULLEST_SOURCE = "github.com/thunlp/Seq1F1B, picture/seq1f1b_memory.svg: heights of its bars over its axes, in GiB"
MEAN_SOURCE = (
    "github.com/thunlp/Seq1F1B, charts without titles, told apart by their lengths and missing bars: "
    "picture/30bx64A100_memory.svg (2.7B), 7bx32A100_memory.svg, right (7B), 13bx32A100_memory.svg, lower (13B), "
    "30bx32A100_memory.svg (30B): heights of their bars over their axes, in GiB"
)
RUNS_A_BAR = 2
"""What one bar is a mean of, beside ranks: two numbers of micro-batches."""
PRINTED_GIB = 0.1
"""Their log cuts each rank's GiB to four characters: one decimal from 10 on (megatron/training.py, training_log)."""

Bars = dict[int, tuple[float | None, ...]]
"""Tokens of a sequence -> GiB by method, in the order of METHODS."""


@dataclass(frozen=True)
class Model:
    """One of the authors' models, how it lay on their A100, and the memory that they drew."""

    name: str
    layers: int
    hidden: int
    heads: int
    ranks: int
    tensor_parallel: int
    fullest_gib: Bars
    """The chart with titles."""
    mean_gib: Bars
    """The charts without."""

    @property
    def accelerators(self) -> int:
        return self.ranks * self.tensor_parallel

    @property
    def microbatches(self) -> int:
        """Two a rank: with more, no rank holds more."""
        return 2 * self.ranks

    @property
    def shape(self) -> ModelShape:
        return named_shape(
            "7b", layers=self.layers, hidden=self.hidden, heads=self.heads, ffn=4 * self.hidden, positions="rope"
        )


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model(
            "2.7B", 32, 2560, 32, ranks=8, tensor_parallel=1,
            fullest_gib={
                16384: (51.4, 70.95, 29.85, 29.7),
                24576: (74.3, OUT, 41.45, 41.9),
                32768: (OUT, OUT, 53.1, 54.45),
            },
            mean_gib={
                16384: (32.61875, 51.625, 22.74375, 23.7),
                24576: (46.51875, OUT, 32.19375, 33.7625),
                32768: (OUT, OUT, 41.5875, 43.46875),
            },
        ),
        Model(
            "7B", 32, 4096, 32, ranks=4, tensor_parallel=8,
            fullest_gib={
                32768: (28.0, 34.2, 18.9, 16.35),
                65536: (51.4, 62.9, 34.3, 28.45),
                131072: (OUT, OUT, 69.8, 57.55),
            },
            mean_gib={
                32768: (19.6375, 25.2875, 15.85, 13.8),
                65536: (35.325, 45.8875, 29.775, 23.175),
                131072: (OUT, OUT, 57.2, 46.6375),
            },
        ),
        Model(
            "13B", 40, 5120, 40, ranks=4, tensor_parallel=8,
            fullest_gib={
                32768: (44.2, 53.25, 29.7, 25.8),
                49152: (64.3, 76.45, 42.35, 35.9),
                65536: (66.85, OUT, 51.6, 42.95),
            },
            mean_gib={
                32768: (31.5375, 39.9875, 25.2, 21.9125),
                49152: (45.0625, 57.275, 36.2125, 30.3125),
                65536: (50.175, OUT, 43.275, 35.575),
            },
        ),
        Model(
            "30B", 64, 6144, 64, ranks=8, tensor_parallel=8,
            fullest_gib={
                32768: (71.4, OUT, 37.6, 38.65),
                49152: (OUT, OUT, 54.7, 55.55),
                65536: (OUT, OUT, 67.5, 66.9),
            },
            mean_gib={
                32768: (44.7, OUT, 28.99375, 30.13125),
                49152: (OUT, OUT, 42.0625, 42.48125),
                65536: (OUT, OUT, 50.0, 50.48125),
            },
        ),
    )
}  # fmt: skip
