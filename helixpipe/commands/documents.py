"""Data of a prediction as flags: whose documents the rows of its steps hold, by the reading that training has."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from helixpipe.config_check import check_packing
from helixpipe.config_data import DataConfig
from helixpipe.errors import ConfigError, DataError
from helixpipe.flags import Parser, flag, number
from helixpipe.predict.estimate import Setting

if TYPE_CHECKING:
    from helixpipe.train.reading import Reading

PACKINGS = ("windows", "documents", "balanced")
LONGEST = ("cut", "drop")
ACROSS = "attention goes across documents: all steps cost the same; see --packing"
# what stands in messages of a config's keys, and its flag here
_FLAGS = {
    "data.path": "--data", "data.packing": "--packing", "data.longest": "--longest",
    "train.sequence_length": "--sequence-length", "train.seed": "--seed",
}  # fmt: skip


def add_data_flags(parser: Parser, steps: int) -> None:
    own = parser.add_argument_group("documents of real data")
    folder = (
        "what helixpipe prepare wrote, or a Megatron pair: rows have its documents' lengths, of the share trained on"
    )
    own.add_argument("--data", metavar="FOLDER", help=folder)
    packing = "as data.packing: windows (attention goes across documents), documents, balanced [windows]"
    own.add_argument("--packing", metavar="P", help=packing)
    own.add_argument("--longest", metavar="L", help="documents longer than a sequence: cut or drop [cut]")
    own.add_argument("--steps", type=number, metavar="N", help=f"the first N steps of a run are priced [{steps}]")
    own.add_argument("--seed", type=number, metavar="S", help="of their order, as train.seed [0]")


class Read(NamedTuple):
    """What is read, and of how many steps."""

    data: DataConfig
    seed: int
    steps: int


def data_from(args: argparse.Namespace, steps: int) -> Read | None:
    """None where no data is named. `steps`: where nothing says how many. Raises ConfigError."""
    given = [name for name in ("packing", "longest", "steps", "seed") if getattr(args, name) is not None]
    if args.data is None:
        if given:
            raise ConfigError(f"{flag(given[0])}: says how data is read; give --data FOLDER too")
        return None
    packing: Any = args.packing or "windows"
    longest: Any = args.longest or "cut"
    for name, value, known in (("packing", packing, PACKINGS), ("longest", longest, LONGEST)):
        if value not in known:
            raise ConfigError(f"{flag(name)}: '{value}' is not known; known: {', '.join(known)}")
    count, seed = steps if args.steps is None else args.steps, args.seed or 0
    for name, value, least in (("steps", count, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{flag(name)}: {value}; give at least {least}")
    data = DataConfig(args.data, packing=packing, longest=longest)
    with named_as_flags():
        check_packing(data, args.sequence_length)
    return Read(data, seed, count)


def packing_told(data: DataConfig, seed: int) -> str:
    """How rows are made, in words."""
    longest = f", longest {data.longest}" if data.packing != "windows" else ""
    return f"packing {data.packing}{longest}, seed {seed}"


def open_reading(data: DataConfig, setting: Setting, microbatches: int, seed: int) -> Reading:
    """Which documents the rows of steps have, as training reads them. Raises DataError."""
    # NumPy, which predictions need for nothing else
    from helixpipe.data.prepared import Prepared, open_documents
    from helixpipe.train.layouts import open_sources, reading_of

    shape, path = setting.shape, str(data.path)
    with named_as_flags():
        found = open_documents(path)  # text is refused here
        if isinstance(found, Prepared) and (largest := found.manifest["largest_token"]) >= shape.vocabulary:
            told = f"--data: '{path}' has token {largest}, beyond the model's vocabulary of {shape.vocabulary}"
            print(f"{told}: lengths are priced as they are, and training would refuse it", file=sys.stderr)
        reading = reading_of(
            open_sources(data, sys.maxsize),
            data,
            shape,
            setting.sequence_length,
            microbatches=microbatches,
            microbatch_size=setting.microbatch_size,
            replicas=setting.data_parallel,
            seed=seed,
        )
    rows = len(reading.layouts[0])
    if rows < reading.rows_a_step:
        raise DataError(
            f"--data: '{path}' makes {rows} sequences to train on, fewer than the {reading.rows_a_step} of a step; give more "
            "data, or fewer or shorter sequences"
        )
    return reading


@contextmanager
def named_as_flags() -> Iterator[None]:
    """Faults name keys of a config, anywhere in their line; here they are flags."""
    try:
        yield
    except (ConfigError, DataError) as error:
        told = re.sub(r"\b(?:data|train)\.\w+", lambda key: _FLAGS.get(key[0], key[0]), str(error))
        raise type(error)(told) from None
