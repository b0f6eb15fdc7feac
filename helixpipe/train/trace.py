"""Trace: one step of every rank as torch's profiler sees it, and on CUDA what its allocator did.

<run>/profile/step-00000010-rank-3.json            for chrome://tracing and ui.perfetto.dev
              step-00000010-rank-3.memory.pickle   for pytorch.org/memory_viz: a snapshot, and the allocations of the step
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from helixpipe.train.manifest import folder_name

# of the allocator's history, entries of a few kilobytes each
_MOST_ENTRIES = 100_000


class Trace:
    """Of one rank. What cannot be written costs a line and never the run."""

    def __init__(self, step: int, folder: Path, rank: int, device: str) -> None:
        """`step`: the one that is traced, 0 is none."""
        self._step, self._rank, self._cuda = step, rank, device.startswith("cuda")
        self._folder = folder / "profile"
        self._profiler: profile | None = None

    def begin(self, step: int) -> None:
        if step != self._step:
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profiler = profile(activities=activities)
        if self._cuda:
            torch.cuda.memory._record_memory_history(max_entries=_MOST_ENTRIES)
        self._profiler.start()

    def end(self) -> str:
        """Write what was traced since `begin`; a line on it, "" where nothing was."""
        if self._profiler is None:
            return ""
        profiler, self._profiler = self._profiler, None
        if self._cuda:
            torch.cuda.synchronize()
        profiler.stop()
        name = f"{folder_name(self._step)}-rank-{self._rank}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            beside = self._folder / f".{name}.json"  # torch says nothing where it cannot write
            profiler.export_chrome_trace(str(beside))
            os.replace(beside, self._folder / f"{name}.json")
            if self._cuda:
                torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.memory.pickle"))
        except (OSError, RuntimeError) as error:
            why = (getattr(error, "strerror", None) or str(error)).lower()
            return f"run.profile_step: rank {self._rank}'s trace cannot be written to {self._folder}: {why}; the run goes on"
        finally:
            if self._cuda:
                torch.cuda.memory._record_memory_history(enabled=None)
        if self._rank:
            return ""
        memory = "with memory snapshots" if self._cuda else "without memory snapshots, which are of CUDA alone"
        return f"step {self._step} is traced in {self._folder}, a file a rank, {memory}"
