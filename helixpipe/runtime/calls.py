"""Calls: whether the modules of parts can be called as the tape calls them; asked when a pipeline is made."""

from __future__ import annotations

import inspect

from torch import nn

from helixpipe.model.attn import Attention
from helixpipe.model.block import Block
from helixpipe.model.embed import Embed
from helixpipe.model.joined import Joined
from helixpipe.model.qkv import QKV
from helixpipe.parts.part import Part

# they hear where documents begin
APART = (Embed, Joined, QKV, Attention, Block)


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


def documents_fault(part: Part, module: nn.Module) -> str:
    """Why a part's sequences cannot hold several documents; "" where they can."""
    asks = part.about.attends or part.about.opaque or "start" in part.about.beside
    if not asks or isinstance(module, APART):
        return ""
    theirs = type(getattr(module, "module", module)).__name__  # that of plain modules is inside of ours
    return (
        f"documents: {part} is {theirs}, which is not told where documents begin; give it one document a sequence, or let the part "
        "be one of helixpipe.model"
    )
