"""Garbage: Python's collector of cycles stands still while a step runs.

A collection looks at containers, all there are when it is a full one (tens of milliseconds for whoever has imported torch), at a
moment of its own on each rank, and other ranks wait for the one that has it. A step leaves no cycles behind: what it makes goes
when its last holder does. Between steps the collector does what has come due, as it is set.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Within it nothing is collected; afterwards the collector is as it was."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
