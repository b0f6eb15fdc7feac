"""Libraries that only some inputs need: imported when they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from helixpipe.errors import ConfigError


def needed(module: str, what: str) -> Any:
    """The module; raises ConfigError, which says how to install it, where it is missing."""
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ConfigError(f"{what} needs {package}, which is not installed; pip install 'helixpipe[data]'") from None
