"""Colours of a drawing: hue by micro-batch, lightness by pass, so that grey prints and any eyes tell passes apart."""

from __future__ import annotations

import math

from helixpipe.schedule.action import Pass

# (lightness, chroma) in OKLCH, where equal lightness looks equally light in every hue
TONES: dict[Pass, tuple[float, float]] = {
    Pass.F: (0.85, 0.085),
    Pass.R: (0.94, 0.035),
    Pass.B: (0.52, 0.150),
    Pass.I: (0.62, 0.140),
    Pass.W: (0.40, 0.100),
}
NAMES: dict[Pass, str] = {
    Pass.F: "forward",
    Pass.R: "recompute",
    Pass.B: "backward",
    Pass.I: "input gradient",
    Pass.W: "weight gradient",
}
FIRST_HUE, LAST_HUE = 20.0, 330.0


def colour(kind: Pass, microbatch: int, microbatches: int) -> str:
    """`#rrggbb` of an action."""
    share = microbatch / max(1, microbatches - 1) if microbatches > 1 else 0.7
    return oklch(*TONES[kind], FIRST_HUE + share * (LAST_HUE - FIRST_HUE))


def dark(kind: Pass) -> bool:
    """Whether text on it should be white."""
    return TONES[kind][0] < 0.72


def oklch(lightness: float, chroma: float, hue: float) -> str:
    """`#rrggbb` of an OKLCH colour (Ottosson's matrices), clipped to what a screen has."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    return "#" + "".join(f"{round(255 * _gamma(min(1.0, max(0.0, channel)))):02x}" for channel in linear)


def _gamma(channel: float) -> float:
    return 12.92 * channel if channel <= 0.0031308 else 1.055 * channel ** (1 / 2.4) - 0.055
