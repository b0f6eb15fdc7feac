"""DualPipeV (DeepSeek's DualPipe repository; the V is that of arXiv 2405.15362): forwards and backwards in pairs.

Rank r holds stages r and 2p-1-r. In the steady state each forward of one chunk stands beside a backward of the other,
so that the messages of one travel under the other's compute. Eight phases, with h = p, q = r:

    1  F0                x 2(h-q-1)        5  B1, then F1 & B0      x h-q-1
    2  F0 F1             x q+1             6  B1 B0                 x q+1, split in I and W from halfway
    3  I1 W F1           x h-q-1           7  W I0                  x h-q-1
    4  F0 & B1, F1 & B0  x m-2h+q+1        8  W                     x q+1

    p=2, m=4, one column a unit of time, F = B = I = W = 1:

    rank 0   0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1 3F2 0B0 3B2 3F3 0B1 3B3 0I2 0W2 0I3 0W3
    rank 1   ... 1F0 2F0 1F1 2F1 1F2 2B0 2F2 1B0 1F3 2B1 2F3 1B1 2B2 1B2 2I3 1I3 2W3 1W3

Bubble (p-1)(f+b-2w)/2 where f >= i >= w, with b = i + w; more where i > f. p + 1/2 micro-batches kept on every
rank; needs m >= 2p. A pair F & B is an F and then a B here; where both run at once (DeepSeek's count) p+1 are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence

from helixpipe.errors import ConfigError
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.families.v_shape import stage_of, v_stages
from helixpipe.schedule.schedule import Schedule

Step = tuple[Pass, int]  # and the chunk; a W has none, it takes what waits longest


def dualpipe_v(
    ranks: int, layers: int, microbatches: int, opaque: Collection[int] = (), ends: Sequence[float] = (0, 0)
) -> Schedule:
    """`opaque`: see gpipe. `ends`: see split_layers."""
    if microbatches < 2 * ranks:
        raise ConfigError(
            f"schedule.microbatches: {microbatches} do not fill dualpipe_v on {ranks} ranks; give at least {2 * ranks}, "
            "or use zb_v"
        )
    orders = tuple(tuple(_actions(rank, ranks, _steps(rank, ranks, microbatches))) for rank in range(ranks))
    return Schedule(v_stages(ranks, layers, opaque, ends), orders)


def _steps(rank: int, ranks: int, microbatches: int) -> Iterator[Step]:
    """The eight phases of one rank."""
    below = ranks - rank - 1
    F0, F1, B0, B1, I0, I1, W = (
        (Pass.F, 0), (Pass.F, 1), (Pass.B, 0), (Pass.B, 1), (Pass.I, 0), (Pass.I, 1), (Pass.W, 0),
    )  # fmt: skip
    yield from [F0] * (2 * below)
    yield from [F0, F1] * (rank + 1)
    yield from [I1, W, F1] * below
    yield from [F0, B1, F1, B0] * (microbatches - 2 * ranks + rank + 1)
    yield from [B1, F1, B0] * below
    for i in range(2 * (rank + 1)):
        # the second half is split, so that W's are left for phases 7 and 8
        split = i > rank
        yield ((I1 if split else B1), (I0 if split else B0))[i % 2]
    yield from [W, I0] * below
    yield from [W] * (rank + 1)


def _actions(rank: int, ranks: int, steps: Iterator[Step]) -> Iterator[Action]:
    """Number the steps: each pass of a chunk takes micro-batches in order."""
    done = {(kind, chunk): 0 for kind in (Pass.F, Pass.B) for chunk in (0, 1)}
    waiting: deque[Action] = deque()
    for kind, chunk in steps:
        if kind is Pass.W:
            yield waiting.popleft()
            continue
        counted = Pass.F if kind is Pass.F else Pass.B
        action = Action(stage_of(rank, chunk, ranks), kind, done[counted, chunk])
        done[counted, chunk] += 1
        if kind is Pass.I:
            waiting.append(action.sibling(Pass.W))
        yield action
