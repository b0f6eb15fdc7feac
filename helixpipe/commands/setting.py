"""The setting of a prediction as flags: model, length, machine, what is kept. simulate, rehearse, plan and show share it."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from helixpipe.commands.shape_flags import add_shape_flags, shape_from
from helixpipe.config import ELEMENT_BYTES
from helixpipe.errors import ConfigError
from helixpipe.flags import Parser, add_family_options, decimal, flag, given_options, number, tokens
from helixpipe.mesh import METHODS
from helixpipe.parts.shapes import SHAPES
from helixpipe.parts.work import Keeping
from helixpipe.predict.estimate import Estimate, Setting, check_actions, estimate_family
from helixpipe.predict.hardware import ACCELERATORS, LINKS, check_communicators, named_accelerator, named_link
from helixpipe.predict.holding import Holding
from helixpipe.predict.nodes import Nodes
from helixpipe.predict.profile import Profile
from helixpipe.schedule.families import FAMILIES
from helixpipe.schedule.schedule import Schedule

NARROWEST = 60
"""Columns: lines are not wrapped for a terminal that has fewer."""
OPTIMIZERS = ("replicated", "sharded")
RECOMPUTE = ("none", "selective", "full")
ONLY_RATIOS = "hardware ideal is no machine: only ratios of predicted times mean anything; name --hardware or --profile for seconds"
"""Printed under seconds of no machine; in JSON it is `only_ratios`."""


def family_parser(command: str, about: str, epilog: str = "") -> Parser:
    """FAMILY, its sizes and options, and the setting."""
    usage = "FAMILY --ranks P --microbatches M --model NAME --sequence-length N [options]"
    parser = Parser(command, usage, about, epilog)
    parser.add_argument("family", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--ranks", type=number, required=True, metavar="P", help="pipeline ranks")
    parser.add_argument("--microbatches", type=number, required=True, metavar="M", help="micro-batches of a step")
    add_setting_flags(parser)
    parser.add_argument("--recompute", default="selective", metavar="R", help=f"{', '.join(RECOMPUTE)} [selective]")
    parser.add_argument(
        "--evenness", type=decimal, default=0.0, metavar="E", help="segments: 0 equal cost, 1 equal length [0]"
    )
    chunk = "tokens at a time through the MLP, over cp and tp [0: all]"
    parser.add_argument("--mlp-chunk", type=number, default=0, metavar="N", help=chunk)
    parser.add_argument("--head-chunk", type=number, default=0, metavar="N", help="the same for head and loss [0: all]")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_family_options(parser)
    return parser


def add_setting_flags(parser: Parser) -> None:
    """The model and the machine."""
    own = parser.add_argument_group("model and machine")
    own.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help=f"{', '.join(SHAPES)}; or a Hugging Face folder, or its config.json",
    )
    own.add_argument(
        "--sequence-length", type=tokens, required=True, metavar="N", help="tokens in a sequence: 4096, 128k"
    )
    own.add_argument("--microbatch-size", type=number, default=1, metavar="B", help="sequences in a micro-batch [1]")
    own.add_argument("--hardware", default="ideal", metavar="NAME", help=f"{', '.join(ACCELERATORS)} [ideal]")
    links = f"between ranks: {', '.join(LINKS)} [free with ideal, loopback with laptop-core, else infiniband]"
    own.add_argument("--link", metavar="NAME", help=links)
    turns = "direction, or pair: messages of two ranks to and fro take turns [direction]"
    own.add_argument("--communicators", default="direction", metavar="C", help=turns)
    tensor = "accelerators that share a rank's matrices [1]"
    own.add_argument(
        "--tp", "--tensor-parallel", dest="tensor_parallel", type=number, default=1, metavar="T", help=tensor
    )
    own.add_argument("--tensor-link", metavar="NAME", help="between these [the hardware's own]")
    context = "such groups that share its sequences, over --link [1]"
    own.add_argument(
        "--cp", "--context-parallel", dest="context_parallel", type=number, default=1, metavar="C", help=context
    )
    own.add_argument("--context-method", default="ring", metavar="M", help="how they attend: ring or ulysses [ring]")
    nodes = "accelerators in a node: --tensor-link joins those in one, --link those in two [whatever --tp is]"
    own.add_argument("--per-node", type=number, metavar="N", help=nodes)
    data = "pipelines side by side, each with these micro-batches [1]"
    own.add_argument("--dp", "--data-parallel", dest="data_parallel", type=number, default=1, metavar="D", help=data)
    own.add_argument(
        "--optimizer", default="replicated", metavar="O", help="its state: replicated, or sharded over dp x cp"
    )
    own.add_argument("--dtype", metavar="D", help=f"{', '.join(ELEMENT_BYTES)} [bfloat16; float32 with laptop-core]")
    own.add_argument(
        "--segment-multiple",
        type=number,
        default=128,
        metavar="N",
        help="lengths of segments are multiples of it [128]",
    )
    own.add_argument(
        "--profile", metavar="FILE", help="measured costs, from helixpipe profile, in place of the hardware's"
    )
    add_shape_flags(parser)


def setting_from(args: argparse.Namespace) -> Setting:
    """The setting that the flags name; raises ConfigError."""
    profile = None
    shape = shape_from(args)
    shape.check_length(args.sequence_length)
    accelerator = named_accelerator(args.hardware)
    dtype = args.dtype or ("float32" if accelerator.name == "laptop-core" else "bfloat16")
    joined, device = named_link(args.link or accelerator.link), accelerator.device
    if args.profile is not None:
        profile = load_profile(args.profile)
        if told := profile.beyond(args.sequence_length):
            print(told, file=sys.stderr)
        dtype = args.dtype or profile.dtype
        profile.check_fits(shape, dtype=dtype)
        joined = named_link(args.link) if args.link else profile.link or named_link("free")
        device = profile.device_type
    recompute, evenness = getattr(args, "recompute", "none"), getattr(args, "evenness", 0.0)
    mlp_chunk, head_chunk = getattr(args, "mlp_chunk", 0), getattr(args, "head_chunk", 0)
    choices: tuple[tuple[str, str, Collection[str]], ...] = (
        ("dtype", dtype, ELEMENT_BYTES),
        ("recompute", recompute, RECOMPUTE),
        ("optimizer", args.optimizer, OPTIMIZERS),
        ("context_method", args.context_method, METHODS),
    )
    for name, value, known in choices:
        if value not in known:
            raise ConfigError(f"{name}: '{value}' is not known; known: {', '.join(known)}")
    if min(mlp_chunk, head_chunk) < 0:
        raise ConfigError("mlp_chunk, head_chunk: below 0; give tokens, or 0 for all at once")
    keeping = Keeping(recompute, ELEMENT_BYTES[dtype], mlp_chunk, head_chunk, device)
    check_communicators(args.communicators)
    found = Setting(
        shape,
        args.sequence_length,
        accelerator,
        replace(joined, communicators=args.communicators),
        keeping,
        args.microbatch_size,
        args.tensor_parallel,
        named_link(args.tensor_link or accelerator.tensor_link, "tensor_link"),
        args.context_parallel,
        args.data_parallel,
        profile,
        evenness=evenness,
        segment_multiple=args.segment_multiple,
        optimizer=args.optimizer,
        context_method=args.context_method,
    )
    if args.per_node is None:
        return found
    return found.on_nodes(nodes_from(args, found), getattr(args, "ranks", None) or 1)


def nodes_from(args: argparse.Namespace, setting: Setting) -> Nodes:
    """Of the accelerators that --per-node puts together."""
    inside = named_link(args.tensor_link or setting.accelerator.tensor_link, "tensor_link")
    return Nodes(args.per_node, inside, setting.link)


def load_profile(path: str) -> Profile:
    """A path may begin like a key: it is said whose it is."""
    try:
        return Profile.load(path)
    except ConfigError as error:
        raise ConfigError(f"--profile: {error}") from None


def dtype_of(setting: Setting) -> str:
    return next(name for name, size in ELEMENT_BYTES.items() if size == setting.keeping.element_bytes)


def estimate_from(args: argparse.Namespace) -> Estimate:
    """What the flags of `family_parser` ask for, priced; raises ConfigError."""
    with as_flags():
        setting, options = _asked(args)
        return estimate_family(setting, args.family, args.ranks, args.microbatches, **options)


def schedule_from(args: argparse.Namespace) -> tuple[Setting, Schedule]:
    """The same schedule and its setting, not priced."""
    with as_flags():
        setting, options = _asked(args)
        setting = setting.of_family(args.family)
        return setting, setting.build(args.family, args.ranks, args.microbatches, **options)


def _asked(args: argparse.Namespace) -> tuple[Setting, dict[str, Any]]:
    setting, options = setting_from(args), given_options(args)
    for name in ("ranks", "microbatches"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name}: {getattr(args, name)}; give at least 1")
    per_microbatch = options.get("segments", 1) * (2 * setting.shape.layers + 1)
    check_actions(3 * max(args.ranks, args.microbatches * per_microbatch))
    return setting, options


@contextmanager
def as_flags(family: str = "FAMILY") -> Iterator[None]:
    """Faults name keys of a config; on the command line they are flags. `family`: what the schedule's family is there."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(flags_named(str(error), family)) from None


def flags_named(message: str, family: str = "FAMILY") -> str:
    """`schedule.segments: ...` -> `--segments: ...`"""
    match = re.match(r"(?:schedule|model|train|runtime|mesh)\.(\w+)|([a-z_]+)(?=:)", message)
    if not match:
        return message
    key = {"family": family, "name": flag("model"), "path": flag("model")}.get(
        match[1] or "", flag(match[1] or match[2])
    )
    return key + message[match.end() :]


def gibibytes(nbytes: float) -> str:
    """Bytes to read: the largest unit that leaves at least 1."""
    for size, unit in ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB")):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} B"


def duration(seconds: float) -> str:
    """Seconds to read."""
    if seconds >= 9999.5:
        return f"{seconds:,.0f} s"
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds:.3g} s"


def wrapped(texts: Iterable[str], first: str = "") -> list[str]:
    """Texts as lines that fit the terminal; `first` begins each, and what follows stands under its end."""
    width = max(NARROWEST, shutil.get_terminal_size().columns)
    found: list[str] = []
    for text in texts:
        found += textwrap.wrap(
            text, width, initial_indent=first, subsequent_indent=" " * (len(first) or 2), break_on_hyphens=False
        ) or [first]
    return found


def options_told(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def holding_told(held: Holding) -> str:
    """What holds a schedule back, in words."""
    return f"{held.what}, on rank {held.rank}: {duration(held.busy_s)} busy where the others have {duration(held.others_s)}"
