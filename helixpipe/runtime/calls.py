"""Calls: whether the modules of parts can be called as the tape calls them; asked when a pipeline is made."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

from helixpipe.errors import ConfigError
from helixpipe.parts.part import Part


def check_calls(modules: Mapping[Part, nn.Module]) -> None:
    """Raise ConfigError for a module whose forward does not take what it will be called with."""
    for part, module in modules.items():
        names = (*part.about.reads, *part.about.beside)
        try:
            signature = inspect.signature(module.forward)
        except (TypeError, ValueError):  # a scripted module tells nothing
            continue
        try:
            signature.bind(*names)
        except TypeError as error:
            raise ConfigError(
                f"{part}: {type(module).__name__} is called as {part.kind}({', '.join(names)}), and its forward{signature} "
                f"does not take that ({error}); wrap it in a module that does, or give plain modules to hp.Layers"
            ) from None
