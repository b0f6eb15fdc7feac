"""Profile: what the parts of a model cost on one machine, measured (`runtime.profiling`), for any length.

    timings          part, pass, length, context -> seconds: what was measured, and all that a file keeps
    curves           fitted to them when first asked for, one per kind of part and pass (`predict.curves`)
    prices           `forward_s`, `input_s`, `weight_s`: a curve at the size that is asked for

A forward is timed with a graph, as without recomputation and in a recompute. One that keeps only inputs was seen to take
1% less on a CPU; that difference is left out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from helixpipe.errors import ConfigError, nearest
from helixpipe.files import json_text, read_text, write_text
from helixpipe.parts.kind import KINDS
from helixpipe.parts.part import Part, chain, layer_parts
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.shapes import SHAPES
from helixpipe.parts.work import Batch, Keeping
from helixpipe.predict.curves import ATTENTION, LINEAR, Curve, Size, fit
from helixpipe.predict.hardware import Link
from helixpipe.schedule.action import Pass

FORMAT = "helixpipe profile 1"
PROFILED = tuple(part.kind for part in chain(1))
"""Kinds that are timed; an opaque layer takes what its parts do."""
WITH_WEIGHTS = tuple(kind for kind in PROFILED if KINDS[kind].splits)
"""Kinds whose weight gradients can be put off; those of norms and tables are part of their I."""
FORWARD, INPUT, WEIGHT = "forward", "input", "weight"
PASSES = {FORWARD: Pass.F, INPUT: Pass.I, WEIGHT: Pass.W}
CURVES = tuple((kind, name) for kind in PROFILED for name in PASSES if name != WEIGHT or kind in WITH_WEIGHTS)
# what a part's cost depends on; layers, eps, the rope's base and tied tables change none
SIZES = (
    "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocabulary", "norm", "mlp", "positions", "qkv_bias", "bias",
    "qk_norm", "causal", "norms", "o_bias", "qk_norm_over", "window", "softcap", "head_transform",
)  # fmt: skip

_LATER = (
    "norm_offset", "norm_bias", "norms", "embed_norm", "embed_scale", "rotary_share", "window_rope_base", "o_bias",
    "qk_norm_over", "attention_scale", "softcap", "window", "head_softcap", "head_transform",
)  # fmt: skip


class Timing(NamedTuple):
    """One pass of one kind of part, of one sequence: `length` tokens behind `context` earlier ones."""

    kind: str
    run: Pass
    length: int
    context: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """Measured part costs (`PartCosts`) of one shape, on one device, in one precision. Layers count for nothing."""

    shape: ModelShape
    device: str
    """The device's own name."""
    dtype: str
    threads: int
    ranks: int
    """How many processes measured at once: they share memory, caches and clock rate as the ranks of a run do."""
    torch: str
    """The version measured with."""
    timings: tuple[Timing, ...]
    link: Link | None = None
    """Between two ranks of this machine; None where there is only one device."""
    device_type: str = "cpu"
    """cpu or cuda."""

    def __post_init__(self) -> None:
        for kind, name in CURVES:
            if len({timing.length for timing in self._of(kind, name)}) < 2:
                raise ConfigError(f"timings: {kind} {name} has fewer than two lengths; measure again: {self.command()}")

    def forward_s(self, part: Part, batch: Batch, segment: int) -> float:
        return self._part_s(part, FORWARD, batch, segment)

    def input_s(self, part: Part, batch: Batch, segment: int) -> float:
        return self._part_s(part, INPUT, batch, segment)

    def weight_s(self, part: Part, batch: Batch, segment: int) -> float:
        return self._part_s(part, WEIGHT, batch, segment)

    def partition_seconds(self, recompute: str = "selective", microbatch_size: int = 1) -> Callable[[int, int], float]:
        """(length, context) -> seconds of a layer's forward, recompute and backward: for `partition.from_costs`.

        Of two segments, neither the sequence's first, one that is the end of the other costs less. The first merges
        with nothing and may cost less than its own end would; no two cuts of a sequence differ in having one.
        """
        layer, keeping = layer_parts(0), Keeping(recompute)
        runs = [(part.kind, name) for part in layer for name in PASSES]
        runs += [(part.kind, FORWARD) for part in layer if keeping.runs_again(part)]

        def seconds(length: int, context: int) -> float:
            size = self.size(length, context, microbatch_size)
            return math.fsum(self._seconds(kind, name, size) for kind, name in runs)

        return seconds

    def beyond(self, length: int) -> str:
        """What to say of sequences longer than any measured; "" when they are not."""
        if length <= self.longest:
            return ""
        return (
            f"profile: {length:,} tokens are {length / self.longest:.3g} times the longest measured ({self.longest:,}), and costs "
            f"are extrapolated; measure with {self.command(sequence_length=length)}"
        )

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence measured."""
        return max(timing.context + timing.length for timing in self.timings)

    @cached_property
    def curves(self) -> dict[tuple[str, str], Curve]:
        """(kind, forward | input | weight) -> curve."""
        terms = {kind: ATTENTION if KINDS[kind].attends else LINEAR for kind in PROFILED}
        return {(kind, name): fit(self.points(kind, name), terms[kind]) for kind, name in CURVES}

    @cached_property
    def worst_error(self) -> float:
        """The largest relative distance between a timing and its curve."""
        return max(curve.worst_error(self.points(*which)) for which, curve in self.curves.items())

    def points(self, kind: str, name: str) -> list[tuple[Size, float]]:
        """What a curve is fitted to."""
        return [(self.size(timing.length, timing.context), timing.seconds) for timing in self._of(kind, name)]

    def check_fits(self, shape: ModelShape, device: str | None = None, dtype: str | None = None) -> None:
        """Raise ConfigError when this was measured for another shape, device or dtype. None is not compared."""
        shape = of_one_window(shape)
        found = [(name, getattr(self.shape, name), getattr(shape, name)) for name in SIZES]
        found += [("device", self.device, device or self.device), ("dtype", self.dtype, dtype or self.dtype)]
        told = ", ".join(f"{name} {mine} where {theirs} is asked for" for name, mine, theirs in found if mine != theirs)
        if told:
            raise ConfigError(f"profile: measured with {told}; measure this one: {self.command(shape, dtype)}")

    def command(self, shape: ModelShape | None = None, dtype: str | None = None, sequence_length: int = 0) -> str:
        """The command that measures a shape (this one when not given)."""
        length = sequence_length or (self.longest if self.timings else 0)
        flags = [_shape_flags(of_one_window(shape or self.shape)), f"--dtype {dtype or self.dtype}"]
        flags += [f"--sequence-length {length}"] if length else []
        return f"helixpipe profile {' '.join(flags)}"

    def to_json(self) -> str:
        """JSON, a line for each timing."""
        facts: dict[str, Any] = {"format": FORMAT, "shape": _fields(self.shape)}
        facts |= {name: getattr(self, name) for name in ("device", "device_type", "dtype", "threads", "ranks", "torch")}
        facts["link"] = self.link and _fields(self.link)
        lines = [f"  {json.dumps(name)}: {json_text(value)},\n" for name, value in facts.items()]
        rows = ",\n".join(f"    {json_text(timing)}" for timing in self.timings)
        return f'{{\n{"".join(lines)}  "timings": [\n{rows}\n  ]\n}}\n'

    @staticmethod
    def from_json(text: str) -> Profile:
        """The profile that `to_json` wrote; raises ConfigError."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"not JSON ({error}); helixpipe profile writes these files") from None
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise ConfigError(f'not a profile: no "format": "{FORMAT}"; helixpipe profile writes these files')
        found.setdefault("device_type", "cpu")  # a file from before it was told
        kinds = {"device": str, "device_type": str, "dtype": str, "torch": str, "threads": int, "ranks": int}
        given = _checked(found, "", {"shape": dict, "link": dict, "timings": list} | kinds, may_be_null=("link",))
        defaults = {field.name: field.default for field in dataclasses.fields(ModelShape)}
        known = _kinds(ModelShape)
        older = {name: defaults[name] for name in known if name in _LATER}  # a file from before there were such models
        given["shape"] = ModelShape(**_checked(older | given["shape"], "shape.", known))
        if given["link"] is not None:
            given["link"] = Link(**_checked({"host_s_per_byte": 0.0} | given["link"], "link.", _kinds(Link)))
            if not given["link"].bytes_per_s:
                raise ConfigError("link.bytes_per_s: 0 is not a rate; measure again, or set link to null")
        given["timings"] = tuple(_timing(row, f"timings[{at}]") for at, row in enumerate(given["timings"]))
        return Profile(**given)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Profile:
        """Raises ConfigError that names the file and its fault."""
        text = read_text(path, ConfigError)
        try:
            return Profile.from_json(text)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Written whole or not at all. Raises HelixpipeError."""
        write_text(path, self.to_json())

    def size(self, length: int, context: int = 0, sequences: int = 1) -> Size:
        """What a curve is asked for."""
        return Size(sequences, length, context, self.shape.window)

    def _sizes(self, part: Part, batch: Batch, segment: int) -> list[Size]:
        """What a part does at once: attention a document at a time, all others the segment."""
        if part.about.attends and batch.documents:
            return [self.size(stop - first, first) for first, stop, _ in batch.runs(segment)]
        return [self.size(batch.segment_lengths[segment], batch.start(segment), batch.microbatch_size)]

    def _of(self, kind: str, name: str) -> list[Timing]:
        return [timing for timing in self.timings if timing.kind == kind and timing.run is PASSES[name]]

    def _part_s(self, part: Part, name: str, batch: Batch, segment: int) -> float:
        return math.fsum(
            times * self._seconds(kind, name, size)
            for inner in part.about.inside(part)
            for kind, times in inner.about.timed_as(inner)
            for size in self._sizes(inner, batch, segment)
        )

    def _seconds(self, kind: str, name: str, size: Size) -> float:
        curve = self.curves.get((kind, name))
        return curve.seconds(size) if curve else 0.0


def merged(profiles: Sequence[Profile], link: Link | None) -> Profile:
    """One profile from what several ranks measured at once."""
    timings = tuple(timing for profile in profiles for timing in profile.timings)
    return dataclasses.replace(profiles[0], ranks=len(profiles), timings=timings, link=link)


def of_one_window(shape: ModelShape) -> ModelShape:
    """The same costs without a pattern. Raises ConfigError where layers have different windows."""
    if len(shape.windows) > 1:
        told = " and ".join(str(window) if window else "none" for window in shape.windows)
        raise ConfigError(
            f"profile: layers of this model have windows of different length ({told}), and a profile times one attention; "
            "leave it away, and name an accelerator"
        )
    return dataclasses.replace(shape, window=shape.windows[0], window_pattern=()) if shape.window_pattern else shape


def _shape_flags(shape: ModelShape) -> str:
    """--model and what differs from it: the named shape that is nearest."""
    differ = {
        name: [key for key in SIZES if getattr(known, key) != getattr(shape, key)] for name, known in SHAPES.items()
    }
    name = min(differ, key=lambda each: len(differ[each]))
    changes: dict[str, Any] = {key: getattr(shape, key) for key in differ[name]}
    if {"hidden", "heads"} & set(changes):  # from which these follow, unless given
        changes |= {"kv_heads": shape.kv_heads} if shape.kv_heads != shape.heads else {}
        changes |= {"head_dim": shape.head_dim} if shape.head_dim * shape.heads != shape.hidden else {}
    if changes.get("positions") == "learned":
        changes["context"] = shape.context
    told = (f"--{key.replace('_', '-')} {str(value).lower()}" for key, value in changes.items())
    return " ".join([f"--model {name}", *told])


def _fields(value: ModelShape | Link) -> dict[str, Any]:
    return {name: getattr(value, name) for name in _kinds(ModelShape if isinstance(value, ModelShape) else Link)}


def _kinds(kind: type[ModelShape] | type[Link]) -> dict[str, type]:
    """Field -> the type of its value; their annotations are texts. What no timing depends on is left out."""
    known = {"int": int, "float": float, "str": str, "bool": bool}
    return {field.name: known[str(field.type)] for field in dataclasses.fields(kind) if str(field.type) in known}


def _checked(
    found: dict[str, Any], place: str, kinds: dict[str, type], may_be_null: Sequence[str] = ()
) -> dict[str, Any]:
    """The object, if it has these keys, no others, and values of these types."""
    for key in found:
        if key not in kinds:
            raise ConfigError(f"{place}{key}: not a key of a profile{nearest(key, kinds)}")
    for key, kind in kinds.items():
        if key not in found:
            raise ConfigError(f"{place}{key}: missing")
        value = found[key]
        fits = type(value) is kind or (kind is float and type(value) is int) or (value is None and key in may_be_null)
        if not fits or (kind is float and not 0 <= value < math.inf):
            names = {int: "a whole number", float: "a number from 0 up", str: "a text", bool: "true or false"}
            told = names.get(kind, "a list" if kind is list else "an object")
            raise ConfigError(f"{place}{key}: {json.dumps(value)[:40]} is not {told}")
    return dict(found)


def _timing(row: object, place: str) -> Timing:
    """A row of `to_json`."""
    if isinstance(row, list) and len(row) == len(Timing._fields):
        kind, run, length, context, seconds = row
        whole = type(length) is type(context) is int and length > 0 <= context
        timed = type(seconds) in (int, float) and 0 < seconds < math.inf
        if kind in PROFILED and run in tuple(PASSES.values()) and whole and timed:
            return Timing(kind, Pass(run), length, context, float(seconds))
    raise ConfigError(f'{place}: {json.dumps(row)[:60]} is not a timing; one is ["qkv", "F", 1024, 0, 0.0125]')
