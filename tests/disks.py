"""Disks that are full soon."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of so many bytes ("64k") on a folder; the test is skipped, and says why, where none can be mounted."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounts a small file system: needs root on Linux")
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], capture_output=True, timeout=60
        )
    except FileNotFoundError:
        pytest.skip("mounts a small file system, and this machine has no mount command")
    if mounted.returncode:
        pytest.skip("may not mount a small file system: root without that right, as in most containers")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True, timeout=60)
