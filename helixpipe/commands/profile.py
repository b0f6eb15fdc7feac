"""`helixpipe profile`"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helixpipe.commands.shape_flags import TIMED_KEYS, add_shape_flags, shape_from
from helixpipe.errors import ConfigError
from helixpipe.files import fault, json_text
from helixpipe.flags import Parser, number
from helixpipe.parts.shape import ModelShape
from helixpipe.parts.shapes import SHAPES

if TYPE_CHECKING:
    from helixpipe.predict.profile import Profile
    from helixpipe.runtime.profiling import Asked

ABOUT = "Measure what the parts of a model and a message cost on this machine, for simulate, rehearse, plan, compare and train."
EPILOG = """\
Parts are timed by the runtime that trains, on sequences of an eighth of N tokens up to N, whole and cut into segments, by
as many processes at once as --ranks says, since ranks of one machine slow each other down. A curve is fitted to each
part and pass; the worst error is its largest distance from a timing. Longer sequences are extrapolated.
"""
DTYPES = ("float32", "bfloat16", "float64")
DEVICES = ("auto", "cpu", "cuda")
MOST_RANKS = 64
SCATTERED = 0.3


def profile(given: list[str]) -> int:
    """`helixpipe profile [options]`"""
    args = _parser().read(given)
    shape = shape_from(args, TIMED_KEYS)
    _check(args)
    from helixpipe.runtime.profiling import measure_machine

    asked, ranks = _asked(args, shape)
    found = measure_machine(asked, ranks)
    found.save(args.out)
    if args.json:
        fits = [
            {
                "part": kind,
                "pass": name,
                "prices_s": curve.prices_s,
                "worst_error": curve.worst_error(found.points(kind, name)),
            }
            for (kind, name), curve in found.curves.items()
        ]
        print(
            json_text({"file": args.out, "worst_error": found.worst_error, "fits": fits} | json.loads(found.to_json()))
        )
        return 0
    print("\n".join([*_table(found, args.sequence_length), *_words(found), f"written: {args.out}"]))
    return 0


def _parser() -> Parser:
    parser = Parser("profile", "[options]", ABOUT, EPILOG)
    parser.add_argument(
        "--model",
        default="tiny",
        metavar="NAME",
        help=f"{', '.join(SHAPES)}; or a Hugging Face folder, or its config.json [tiny]",
    )
    parser.add_argument(
        "--sequence-length", type=number, default=2048, metavar="N", help="the longest to time, tokens [2048]"
    )
    parser.add_argument("--dtype", default="float32", metavar="D", help=f"{', '.join(DTYPES)} [float32]")
    parser.add_argument(
        "--device", default="auto", metavar="D", help=f"{', '.join(DEVICES)}; auto is cuda where there is one"
    )
    parser.add_argument("--threads", type=number, default=1, metavar="N", help="CPU threads of a rank [1]")
    parser.add_argument(
        "--ranks",
        type=number,
        metavar="P",
        help="processes that measure at once [2 where there are two cores or devices]",
    )
    parser.add_argument("--rounds", type=number, default=5, metavar="N", help="times are medians of so many [5]")
    parser.add_argument("--out", default="profile.json", metavar="FILE", help="where the profile goes [profile.json]")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_shape_flags(parser, TIMED_KEYS)
    return parser


def _check(args: Namespace) -> None:
    for name, known in (("dtype", DTYPES), ("device", DEVICES)):
        if getattr(args, name) not in known:
            raise ConfigError(f"--{name}: '{getattr(args, name)}' is not known; known: {', '.join(known)}")
    for name in ("threads", "rounds", "ranks"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: {value}; give at least 1")
    if (args.ranks or 1) > MOST_RANKS:
        raise ConfigError(f"--ranks: {args.ranks} processes at once are more than {MOST_RANKS}; two tell as much")
    out = Path(args.out)
    if why := fault(out):  # said now rather than after minutes
        raise ConfigError(f"--out: {args.out} cannot be written: {why}")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"--out: {args.out} is a folder or in none; name a file in a folder that is there")


def _asked(args: Namespace, shape: ModelShape) -> tuple[Asked, int]:
    """What to measure, and by how many ranks at once."""
    import torch

    from helixpipe.runtime.profiling import Asked, default_cuts

    cuts = default_cuts(shape, args.sequence_length)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    places = torch.cuda.device_count() if device == "cuda" else max(1, (os.cpu_count() or 1) // args.threads)
    if not places:
        raise ConfigError("--device: 'cuda', and torch sees none here; use 'auto' or 'cpu'")
    ranks = args.ranks or min(2, places)
    if device == "cuda" and ranks > places:
        raise ConfigError(f"--ranks: {ranks} ranks, and {places} CUDA devices here; give at most {places}")
    return Asked(shape, device, args.dtype, cuts, args.rounds, args.threads, told=True), ranks


def _table(found: Profile, length: int) -> list[str]:
    """A row a part and pass: milliseconds at a few lengths, and behind as many tokens again."""
    sizes = [found.size(length // 4), found.size(length // 2), found.size(length)]
    sizes += [found.size(length // 2, length // 2)] if found.shape.causal else []
    heads = [f"{size.length} behind {size.context}" if size.context else f"{size.length} tokens" for size in sizes]
    lines = [f"{'part':<6} {'pass':<8}" + "".join(f"{head:>20}" for head in heads) + f"{'worst error':>14}"]
    for (kind, name), curve in found.curves.items():
        cells = "".join(f"{1e3 * curve.seconds(size):>17.3f} ms" for size in sizes)
        lines.append(f"{kind:<6} {name:<8}{cells}{curve.worst_error(found.points(kind, name)):>13.1%}")
    return lines


def _words(found: Profile) -> list[str]:
    """Where and how this was measured."""
    facts: list[Any] = [
        found.device,
        found.dtype,
        f"torch {found.torch}",
        f"{found.threads} thread{'s' * (found.threads > 1)} a rank",
    ]
    lines = ["", f"{', '.join(facts)}; ranks that measured at once: {found.ranks}"]
    if found.worst_error > SCATTERED:
        lines.append(
            f"timings are up to {found.worst_error:.0%} off their curves: other work on this machine, or parts too small to time; "
            "measure when it is idle, with more --rounds or a longer --sequence-length"
        )
    if found.link is None:
        return [*lines, "link: not measured, with one device; name one where a prediction asks for it"]
    link = found.link
    taken = f", and {1e9 * link.host_s_per_byte:.2f} s of each rank's computing a GB" if link.host_s_per_byte else ""
    return [*lines, f"link: {link.bytes_per_s / 1e9:.2f} GB/s, latency {link.latency_s * 1e6:.0f} us{taken}"]
