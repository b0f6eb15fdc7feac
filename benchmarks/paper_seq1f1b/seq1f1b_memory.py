"""Memory of the authors' runs, predicted and drawn: the fullest rank beside the fullest, the mean of ranks beside the mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from seq1f1b_authors import METHODS, PRINTED_GIB, RUNS_A_BAR, Bars, Model

from helixpipe.predict.estimate import Estimate
from helixpipe.schedule.action import Pass

GIB = 2**30


def memory_row(model: Model, length: int, found: dict[str, Estimate], copied: bool = False) -> dict[str, Any]:
    """One model at one length: GiB of every method, predicted and drawn, and ratios to 1F1B.

    `copied`: with the second copy of keys and values that the authors' attention keeps.
    """
    methods: dict[str, dict[str, Any]] = {}
    for at, method in enumerate(METHODS):
        each = found[method]
        more = kept_twice_bytes(each) if copied else (0,) * model.ranks
        ranks = [(peak + extra) / GIB for peak, extra in zip(each.timeline.peak_bytes, more, strict=True)]
        methods[method] = {
            "ranks_gib": ranks, "fullest_gib": max(ranks), "mean_gib": sum(ranks) / len(ranks),
            "fits": max(ranks) * GIB <= each.setting.accelerator.memory_bytes,
            "published_fullest_gib": model.fullest_gib[length][at], "published_mean_gib": model.mean_gib[length][at],
        }  # fmt: skip
    first = methods["1F1B"]
    for each_method in methods.values():
        for prefix in ("", "published_"):
            fullest, mean = (each_method[f"{prefix}{name}_gib"] for name in ("fullest", "mean"))
            base = first[f"{prefix}fullest_gib"]
            each_method[f"{prefix}over_1f1b"] = fullest / base if fullest and base else None
            each_method[f"{prefix}evenness"] = mean / fullest if fullest and mean else None
        for name in ("fullest", "mean"):
            theirs = each_method[f"published_{name}_gib"]
            each_method[f"{name}_share"] = each_method[f"{name}_gib"] / theirs if theirs else None
    return {"model": model.name, "tokens": length, "methods": methods}


def kept_twice_bytes(found: Estimate) -> tuple[int, ...]:
    """Per rank, the most that a second copy of keys and values takes.

    The authors' attention (megatron/model/transformer.py, FlashAttnVarlenFunc) saves each segment's keys and values for its
    backward, and beside them keeps those of all segments so far in one tensor: one a layer and sequence, from its second
    segment on.
    """
    schedule, setting, batch = found.schedule, found.setting, found.program.batches[0]
    layers = [sum(part.kind == "attn" for part in stage.parts) for stage in schedule.stages]
    token_bytes = 2 * setting.shape.kv_size * setting.keeping.element_bytes // setting.tensor_parallel
    most = []
    for rank in schedule.ranks:
        under_way: dict[tuple[int, int], list[int]] = {}  # segments' tokens
        held = high = 0
        for action in rank:
            segments = under_way.setdefault((action.stage, action.microbatch), [])
            held -= copied_tokens(segments) * layers[action.stage]
            if action.kind is Pass.F:
                segments.append(batch.tokens(action.segment))
            else:
                segments.pop()
            held += copied_tokens(segments) * layers[action.stage]
            high = max(high, held)
        most.append(high * token_bytes)
    return tuple(most)


def copied_tokens(segments: list[int]) -> int:
    """A first segment alone is not copied."""
    return sum(segments) if len(segments) > 1 else 0


def is_mean_of(gib: float, printed: int) -> bool:
    """Whether a bar can be the mean of so many numbers printed to one decimal: heights are known to a millionth."""
    steps = gib * printed / PRINTED_GIB
    return abs(steps - round(steps)) < 0.01


def drawn(bars: Bars) -> list[float]:
    """The bars that are there."""
    return [bar for by_method in bars.values() for bar in by_method if bar is not None]


def grain(models: Iterable[Model]) -> list[dict[str, Any]]:
    """Per model, how many bars of each chart can be a mean of so many numbers that the authors' log prints."""
    found = []
    for model in models:
        titled, untitled = drawn(model.fullest_gib), drawn(model.mean_gib)

        def fitting(bars: list[float], ranks: int) -> int:
            return sum(is_mean_of(bar, RUNS_A_BAR * ranks) for bar in bars)

        found.append({
            "model": model.name, "ranks": model.ranks, "bars": len(titled), "one_rank": fitting(titled, 1),
            "all_ranks": fitting(untitled, model.ranks), "half_the_ranks": fitting(untitled, model.ranks // 2),
            "untitled_one_rank": fitting(untitled, 1),
        })  # fmt: skip
    return found


def k(length: int) -> str:
    return f"{length // 1024}k"


def span(values: Iterable[float]) -> str:
    """`0.58 to 0.63`, or the one value that there is."""
    every = list(values)
    least, most = f"{min(every):.2f}", f"{max(every):.2f}"
    return least if least == most else f"{least} to {most}"


def cells(row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A row's methods, each with its name: `7B 1F1B at 64k`."""
    return [(f"{row['model']} {method} at {k(row['tokens'])}", found) for method, found in row["methods"].items()]


def in_short(rows: list[dict[str, Any]]) -> str:
    """What the tables say, counted from them."""
    every = [cell for row in rows for cell in cells(row)]
    ran = [(name, found) for name, found in every if found["published_fullest_gib"] is not None]
    failed = [(name, found) for name, found in every if found["published_fullest_gib"] is None]
    above = [name for name, found in ran if found["fullest_share"] > 1]
    by_model = {
        model: [found for row in rows if row["model"] == model for _, found in cells(row) if found["fullest_share"]]
        for model in dict.fromkeys(row["model"] for row in rows)
    }
    shares = "; ".join(f"{model} {span(each['fullest_share'] for each in some)}" for model, some in by_model.items())
    off = {name: abs(found["evenness"] - found["published_evenness"]) for name, found in ran}
    worst = max(off, key=lambda name: off[name])
    rest = max(value for name, value in off.items() if name != worst)
    pairs = [(row, row["methods"]["Seq1F1B"]) for row in rows if row["methods"]["Seq1F1B"]["published_over_1f1b"]]
    ratios = "; ".join(
        f"{row['model']} {k(row['tokens'])} {each['published_over_1f1b']:.2f} and {each['over_1f1b']:.2f}"
        for row, each in pairs
    )
    missed = [name for name, found in failed if found["fits"]]
    feared = [name for name, found in ran if not found["fits"]]
    lines = [
        f"- Fullest rank, predicted over measured: {span(found['fullest_share'] for _, found in ran)} in {len(ran)} runs, "
        f"above 1 in {len(above) or 'none'}. {shares}.",
        f"- Mean of the ranks, predicted over measured: {span(found['mean_share'] for _, found in ran)}. Mean over fullest "
        f"is predicted within {rest:.2f} of what was measured, but for {worst} ({off[worst]:.2f}).",
        f"- Seq1F1B over 1F1B, fullest rank to fullest rank, measured and predicted: {ratios}.",
        f"- Out of memory on 80 GB: of {len(failed)} runs that failed, {len(failed) - len(missed)} are predicted to fail"
        f"{listed(', not ', missed)}; of {len(ran)} that ran, {len(feared) or 'none'}{listed(': ', feared)}.",
    ]
    return "\n".join(lines)


def listed(lead: str, names: list[str]) -> str:
    return lead + ", ".join(names) if names else ""


def number(value: float | None, digits: int = 1) -> str:
    return "out of memory" if value is None else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def memory_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | tokens | schedule | fullest predicted | measured | predicted / measured | over 1F1B predicted | measured "
        "| mean predicted | measured | predicted / measured |",
        "| --- " * 11 + "|",
    ]
    for row in rows:
        for method, found in row["methods"].items():
            parts = [
                row["model"], k(row["tokens"]), method,
                number(found["fullest_gib"]) + ("" if found["fits"] else ", does not fit"),
                number(found["published_fullest_gib"], 2), share(found["fullest_share"]),
                share(found["over_1f1b"]), share(found["published_over_1f1b"]),
                number(found["mean_gib"]), number(found["published_mean_gib"], 2), share(found["mean_share"]),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)


def grain_table(models: Iterable[Model]) -> str:
    """Of each chart's bars, how many are the mean over two runs of so many ranks' printed GiB."""
    head = (
        "model",
        "ranks",
        "bars of a chart",
        "titled: one rank",
        "untitled: one rank",
        "half the ranks",
        "all ranks",
    )
    keys = ("model", "ranks", "bars", "one_rank", "untitled_one_rank", "half_the_ranks", "all_ranks")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    return "\n".join(lines + [f"| {' | '.join(str(each[key]) for key in keys)} |" for each in grain(models)])


def varied_memory_table(varied: list[dict[str, Any]]) -> str:
    """Fullest over 1F1B's fullest, and mean over fullest: what was measured, and under each assumption."""
    columns = [f"{method} over 1F1B" for method in METHODS[1:]] + [f"{method} mean over fullest" for method in METHODS]
    lines = [f"| model | tokens | assumption | {' | '.join(columns)} |", "| --- " * (3 + len(columns)) + "|"]
    for row in varied:
        where = f"{row['model']} | {k(row['tokens'])}"
        for name, prefix in (("measured", "published_"), (row["assumption"], "")):
            if name == "measured" and row["assumption"] != "as stated":
                continue
            methods = row["methods"]
            values = [methods[m][f"{prefix}over_1f1b"] for m in METHODS[1:]]
            values += [methods[m][f"{prefix}evenness"] for m in METHODS]
            lines.append(f"| {where} | {name} | {' | '.join(map(share, values))} |")
    return "\n".join(lines)
