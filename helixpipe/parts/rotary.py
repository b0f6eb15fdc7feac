"""Rotary: how rotary positions are scaled, without torch: frequencies and attention's factor of every type there is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rotary:
    """The keys of a Hugging Face config's `rope_parameters` (`rope_scaling` in older ones), but for the base."""

    type: str = "default"
