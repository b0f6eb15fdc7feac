"""Heap: bytes on the C heap of this process, of all its threads, and their peak: what the allocator holds, asked of it.

torch's profiler sees what the main thread frees on a CPU; messages end in others. So a small library (`heapmeter.c`) stands
before glibc's allocator. It must be there when a process starts:

    with heap.metered():                     compiles it once, puts it into the environment of processes started here
        run_forked(job)
    ...                                      in such a process:
    peak_bytes = heap.over_before(step)      the most that step held at one time, beyond what stood before it
"""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).with_name("heapmeter.c")
PRELOAD = "LD_PRELOAD"
COMPILE_S = 60.0


class NoMeter(Exception):
    """This machine, or this process, has no meter; one line says why."""


@contextmanager
def metered() -> Iterator[None]:
    """Processes started within it have the meter. Raises NoMeter where there can be none."""
    before = os.environ.get(PRELOAD)
    os.environ[PRELOAD] = ":".join(filter(None, (str(library()), before)))
    try:
        yield
    finally:
        if before is None:
            del os.environ[PRELOAD]
        else:
            os.environ[PRELOAD] = before


def why_not() -> str:
    """Why there can be no meter on this machine, in one line; empty where there is one."""
    try:
        library()
    except NoMeter as error:
        return str(error)
    return ""


def now_bytes() -> int:
    """On the heap at this moment."""
    return int(_meter().heapmeter_now())


def peak_bytes() -> int:
    """The most since `reset`, or since the process began."""
    return int(_meter().heapmeter_peak())


def reset() -> None:
    """The peak starts anew from what there is now."""
    _meter().heapmeter_reset()


def over_before(step: Callable[[], object]) -> int:
    """The most bytes on the heap while `step` ran, beyond those just before it."""
    gc.collect()  # garbage of before would be taken for room
    reset()
    before = now_bytes()
    step()
    return peak_bytes() - before


@functools.cache
def library() -> Path:
    """The compiled meter, made where this user's last one of the same source is not there. Raises NoMeter."""
    if not sys.platform.startswith("linux"):
        raise NoMeter(f"no heap meter on {sys.platform}: it is preloaded before glibc's allocator, which Linux has")
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise NoMeter("no heap meter without a C compiler: install one as cc, gcc or clang")
    digest = hashlib.sha256(SOURCE.read_bytes() + compiler.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"helixpipe-heapmeter-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise NoMeter(f"no heap meter: {folder} is another user's; set TMPDIR to a folder of your own")
    found = folder / f"{digest}.so"
    if not found.exists():
        _compile(compiler, found)
    return found


def _compile(compiler: str, found: Path) -> None:
    with tempfile.TemporaryDirectory(dir=found.parent) as scratch:
        made = Path(scratch) / found.name
        # what the C library lacks is an error here, not of every process started with it
        flags = ["-O2", "-fPIC", "-shared", "-fno-builtin", "-Wl,-z,defs"]
        done = subprocess.run(
            [compiler, *flags, "-o", str(made), str(SOURCE)], capture_output=True, text=True, timeout=COMPILE_S
        )
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line or "undefined" in line), "")
            raise NoMeter(
                f"no heap meter: {compiler} does not compile {SOURCE.name} for this C library: {said.strip()}"
            )
        made.replace(found)  # at once, so that others who compile it find all or nothing


@functools.cache
def _meter() -> ctypes.CDLL:
    here = ctypes.CDLL(None)
    try:
        here.heapmeter_now.restype = here.heapmeter_peak.restype = ctypes.c_long
        here.heapmeter_reset.restype = None
    except AttributeError:
        raise NoMeter("no heap meter in this process: start it within heap.metered()") from None
    return here
