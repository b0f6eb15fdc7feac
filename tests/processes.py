"""What other processes say."""

from __future__ import annotations

import subprocess
import sys


def printed(code: str) -> set[str]:
    """What Python code prints in processes that hash otherwise: one text where that makes no difference."""
    return {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, timeout=120, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
