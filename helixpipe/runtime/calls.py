"""Calls: whether the modules of parts can be called as the tape calls them; asked when a pipeline is made."""

from __future__ import annotations

import inspect

from torch import nn

from helixpipe.parts.part import Part


def call_fault(part: Part, module: nn.Module) -> str:
    """Why a module's forward does not take what it will be called with; "" where it does."""
    names = (*part.about.reads, *part.about.beside)
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):  # a scripted module tells nothing
        return ""
    try:
        signature.bind(*names)
    except TypeError as error:
        return (
            f"{part}: {type(module).__name__} is called as {part.kind}({', '.join(names)}), and its forward{signature} "
            f"does not take that ({error}); wrap it in a module that does, or give plain modules to hp.Layers"
        )
    return ""
