"""Candidates: the schedules that a plan tries, and how each would keep activations.

family x options (v, k, evenness, folds, travel, groups) x recompute x chunks
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from helixpipe.parts.part import AROUND_ATTENTION
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.work import Keeping
from helixpipe.predict.estimate import Setting
from helixpipe.schedule import families

RECOMPUTE = ("none", "selective", "full")
CHUNK = 4096
"""Tokens at a time where MLP and head are chunked."""
SEGMENTS = (2, 4, 8, 16, 32)
STAGES_PER_RANK = (2, 4, 8)
EVENNESS = (0.0, 0.5)
CONSTRUCTED = "constructed"
MOST_BUILT = 8192
"""Actions of an order that is built for its costs: more take minutes."""
KEPT_SHARE = 0.75
"""Of the room that weights leave, what forwards may keep there; the rest is for what runs and what is sent."""
MOST_PIECES = 64
"""Segments times stages a rank: more pieces gain nothing and cost a start each."""


class Candidate(NamedTuple):
    """A schedule that could be, and how it would keep activations."""

    family: str
    options: tuple[tuple[str, Any], ...]
    evenness: float = 0.0
    recompute: str = "selective"
    chunk: int = 0
    """Tokens at a time through MLP and head; 0 is all at once."""

    def __str__(self) -> str:
        told = [f"{name} {value}" for name, value in self.options]
        told += [f"evenness {self.evenness:g}"] if self.evenness else []
        return f"{self.family}, {', '.join([*told, self.kept])}"

    @property
    def kept(self) -> str:
        """What a forward keeps, in words."""
        return f"recompute {self.recompute}" + (f", chunks of {self.chunk}" if self.chunk else "")


SPREAD = ("vocabulary", "spread")
"""An option of every family: embedding and head are divided over the ranks."""


def candidates(
    ranks: int, layers: int, sequence_length: int, multiple: int, causal: bool = True, only: Sequence[str] = ()
) -> list[Candidate]:
    """All that make sense, of named families; sizes that a family refuses are left to it.

    `constructed` has as many orders as there are memories: it is tried where something is found (see `like`).
    """
    segments = [k for k in SEGMENTS if causal and k * multiple <= sequence_length]
    stages = [v for v in STAGES_PER_RANK if v * ranks <= layers + 1]
    grids: dict[str, dict[str, Sequence[Any]]] = {
        "interleaved": {"stages_per_rank": stages},
        "breadth_first": {"stages_per_rank": stages},
        "terapipe": {"segments": segments},
        "seq1f1b": {"segments": segments},
        "seq1f1b_zb": {"segments": segments},
        "seq1f1b_interleaved": {"segments": segments, "stages_per_rank": stages},
        "slimpipe": {"segments": segments, "stages_per_rank": [1, *stages]},
        "helix": {
            "folds": (1, 2), "travel": tuple(AROUND_ATTENTION), "groups": ("sequential", "forward_first"),
        },
    }  # fmt: skip
    chunks = chunk_sizes(sequence_length)
    found = []
    for family in only or (name for name in families.FAMILIES if name != CONSTRUCTED):
        grid = grids.get(family, {})
        for values in itertools.product(*grid.values()):
            options = tuple(zip(grid, values, strict=True))
            given = dict(options)
            if given.get("segments", 1) * given.get("stages_per_rank", 1) > MOST_PIECES:
                continue
            by_cost = "segments" in grid and families.default_partition(family) != "even"
            evenness = EVENNESS if by_cost else (0.0,)
            found += [Candidate(family, options, *each) for each in itertools.product(evenness, RECOMPUTE, chunks)]
    return found


def spread(candidate: Candidate) -> Candidate:
    """The same with the vocabulary on all ranks."""
    return candidate._replace(options=(*candidate.options, SPREAD)) if SPREAD not in candidate.options else candidate


def like(candidate: Candidate, kept_bytes: float) -> Candidate | None:
    """An order built for what stages cost, with a candidate's stages and segments, where forwards may keep so many bytes.

    None of a family whose placement it does not have.
    """
    given = dict(candidate.options)
    if candidate.family in ("helix", CONSTRUCTED) or kept_bytes <= 0:
        return None
    v_shaped = candidate.family in ("zb_v", "v_half", "v_min", "dualpipe_v")
    stages = 2 if v_shaped else given.get("stages_per_rank", 1)
    placement = "v" if v_shaped else "looped" if stages > 1 else "line"
    options: dict[str, Any] = {"placement": placement, "segments": given.get("segments", 1), "stages_per_rank": stages}
    options["memory"] = f"{kept_bytes / 2**30:.2f}GiB"
    options |= {"vocabulary": given["vocabulary"]} if "vocabulary" in given else {}
    return candidate._replace(family=CONSTRUCTED, options=tuple(options.items()))


def together(candidate: Candidate, ranks: int, microbatches: int) -> int:
    """Micro-batches whose forwards a rank has all run before its first backward, by its family's definition; at least 1."""
    given = dict(candidate.options)
    if candidate.family in ("gpipe", "breadth_first", "terapipe") or given.get("groups") == "forward_first":
        return microbatches
    return min(microbatches, given.get("folds", 2) * ranks) if candidate.family == "helix" else 1


def chunk_sizes(sequence_length: int, context_parallel: int = 1) -> tuple[int, ...]:
    """A chunk is of all context-parallel ranks together: as many tokens on each."""
    chunk = CHUNK * context_parallel
    return (0, chunk) if sequence_length > chunk else (0,)


def slices(shape: ModelShape) -> bool:
    """Whether a part of the model can run in slices."""
    keeping = Keeping(mlp_chunk=1, head_chunk=1)
    return any(shape.about(p).chunk(keeping) for part in shape.chain() for p in shape.about(part).inside(part))


def setting_of(setting: Setting, candidate: Candidate) -> Setting:
    """With what is the candidate's own."""
    keeping = replace(
        setting.keeping, recompute=candidate.recompute, mlp_chunk=candidate.chunk, head_chunk=candidate.chunk
    )
    return replace(setting, keeping=keeping, evenness=candidate.evenness).of_family(candidate.family)
