"""The program people run: data, loop, optimizer, checkpoint, launch, log. `main` is `helixpipe train`."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """`helixpipe train [config.toml] [--section.key value ...] [--resume [PATH]]`; the exit code.

    Raises HelixpipeError for bad input. torch is imported only once all of that has been checked.
    """
    if "--help" in arguments or "-h" in arguments:
        from helixpipe.train.help import show_help

        return show_help()
    from helixpipe.train.launch import launch

    return launch(arguments)
