"""Documents: those of a batch's sequences as a caller may give them, and where in its own each token is."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from helixpipe.errors import ConfigError
from helixpipe.model.rope import Positions
from helixpipe.parts.work import Batch, Lengths
from helixpipe.sequence.documents import Documents

Given = Documents | Tensor | Sequence[Sequence[int]] | None


def document_lengths(given: Given, sequences: int, length: int) -> Lengths:
    """Of a batch's sequences, all of `length` tokens. Raises ConfigError for documents that do not cover them."""
    if given is None:
        return ()
    if isinstance(given, Documents):
        rows = _of_documents(given, sequences, length)
    elif isinstance(given, Tensor):
        if tuple(given.shape) != (sequences, length) or given.is_floating_point():
            kind = str(given.dtype).removeprefix("torch.")
            raise ConfigError(
                f"documents: {kind} {list(given.shape)}; ids of documents are int64 [{sequences}, {length}], one a token"
            )
        rows = [_of_ids(number, ids) for number, ids in enumerate(given)]
    else:
        try:
            rows = [tuple(operator.index(each) for each in row) for row in given]
        except TypeError:
            raise ConfigError(
                "documents: give of each sequence the lengths of its documents, such as [[5, 7], [12]], or an id a token, "
                "int64 [sequences, tokens]"
            ) from None
    if len(rows) != sequences:
        raise ConfigError(f"documents: of {len(rows)} sequences, and the batch has {sequences}; give those of each")
    for number, row in enumerate(rows):
        if sum(row) != length or min(row) < 1:
            raise ConfigError(
                f"documents: those of sequence {number} have {sum(row)} tokens together, and it has {length}; give the lengths "
                "of all its documents, none 0"
            )
    return tuple(rows) if any(len(row) > 1 for row in rows) else ()


def positions(batch: Batch, device: torch.device) -> Positions:
    """Of every token of a micro-batch, whole."""
    at, lengths = [], []
    for row in batch.documents:
        each = torch.tensor(row)
        starts = (each.cumsum(0) - each).repeat_interleave(each)
        at.append(torch.arange(batch.sequence_length) - starts)
        lengths.append(each.repeat_interleave(each))
    return Positions(torch.stack(at).to(device), torch.stack(lengths).to(device))


def _of_documents(given: Documents, sequences: int, length: int) -> list[tuple[int, ...]]:
    if given.length != length:
        raise ConfigError(f"documents: made for {given.length} tokens, and a sequence has {length}; make them anew")
    found: list[tuple[int, ...]] = []
    for row in given.rows:
        lengths = tuple(span.stop - span.start for span in row.spans)
        _check_apart(len(found), [span.document for span in row.spans])
        found += [lengths] * ((sequences if row.stop is None else row.stop) - row.first)
    return found


def _of_ids(number: int, ids: Tensor) -> tuple[int, ...]:
    values, counts = torch.unique_consecutive(ids, return_counts=True)
    _check_apart(number, values.tolist())
    return tuple(counts.tolist())


def _check_apart(number: int, ids: list[int]) -> None:
    """A document is a run of tokens."""
    seen: set[int] = set()
    for each in ids:
        if each in seen:
            raise ConfigError(
                f"documents: {each} comes again in sequence {number}, after another; a document's tokens are neighbours: give "
                "each an id of its own"
            )
        seen.add(each)
