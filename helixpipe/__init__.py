"""helixpipe trains transformers on sequences too long for one accelerator.

A pipeline schedule is a value: the same value is checked, drawn, priced, lowered and executed.
Importing this does not import torch; `Pipeline`, `Layers` and others do when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from helixpipe.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    HelixpipeError,
    RankError,
    ScheduleError,
    UncountedWarning,
)
from helixpipe.mesh import MeshShape
from helixpipe.parts.lora import Lora
from helixpipe.parts.part import Part, Value
from helixpipe.parts.rotary import Rotary
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.shapes import named_shape
from helixpipe.parts.work import Batch
from helixpipe.predict.choices import Choice
from helixpipe.predict.estimate import Estimate, Setting, estimate, simulate
from helixpipe.predict.hardware import Accelerator, Link
from helixpipe.predict.plan import Plan, plan
from helixpipe.predict.simulate import simulate_program, simulate_schedule
from helixpipe.predict.timeline import Timeline
from helixpipe.schedule.action import Action, Pass
from helixpipe.schedule.check import check
from helixpipe.schedule.families import build_schedule
from helixpipe.schedule.lower import lower
from helixpipe.schedule.program import Program
from helixpipe.schedule.schedule import Schedule
from helixpipe.schedule.stage import Stage

if TYPE_CHECKING:
    from helixpipe.hub.load import load
    from helixpipe.model.attn import Attention
    from helixpipe.model.decoder import Decoder, Model
    from helixpipe.model.head import counted
    from helixpipe.model.layers import Layers
    from helixpipe.runtime.launch import launch
    from helixpipe.runtime.losses import Losses
    from helixpipe.runtime.mesh import make_device_mesh
    from helixpipe.runtime.pipeline import Pipeline
    from helixpipe.sequence import ring_attention, ulysses_attention
    from helixpipe.train.export import export

__version__ = _version("helixpipe")

# names that need torch -> where they are
_LATE = {
    "Attention": "helixpipe.model.attn",
    "Decoder": "helixpipe.model.decoder",
    "Layers": "helixpipe.model.layers",
    "Losses": "helixpipe.runtime.losses",
    "Model": "helixpipe.model.decoder",
    "Pipeline": "helixpipe.runtime.pipeline",
    "export": "helixpipe.train.export",
    "launch": "helixpipe.runtime.launch",
    "load": "helixpipe.hub.load",
    "counted": "helixpipe.model.head",
    "make_device_mesh": "helixpipe.runtime.mesh",
    "ring_attention": "helixpipe.sequence",
    "ulysses_attention": "helixpipe.sequence",
}

__all__ = [
    "Accelerator",
    "Action",
    "Attention",
    "Batch",
    "CheckpointError",
    "Choice",
    "ConfigError",
    "DataError",
    "Decoder",
    "Estimate",
    "HelixpipeError",
    "Layers",
    "Link",
    "Lora",
    "Losses",
    "MeshShape",
    "Model",
    "ModelShape",
    "Part",
    "Pass",
    "Pipeline",
    "Plan",
    "Program",
    "RankError",
    "Rotary",
    "Schedule",
    "ScheduleError",
    "Setting",
    "Stage",
    "Timeline",
    "UncountedWarning",
    "Value",
    "build_schedule",
    "check",
    "counted",
    "estimate",
    "export",
    "launch",
    "load",
    "lower",
    "make_device_mesh",
    "named_shape",
    "plan",
    "ring_attention",
    "simulate",
    "simulate_program",
    "simulate_schedule",
    "ulysses_attention",
]


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    raise AttributeError(f"module 'helixpipe' has no attribute '{name}'")
