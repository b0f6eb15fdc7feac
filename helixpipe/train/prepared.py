"""A prepared folder as what is trained on: its pieces, where it may be cut, and whether the model knows its words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from helixpipe.data.inputs import MANIFEST, is_prepared
from helixpipe.data.journal import JOURNAL
from helixpipe.data.prepared import Prepared
from helixpipe.errors import DataError
from helixpipe.files import fault
from helixpipe.train.pieces import Piece


def open_prepared(given: str, vocabulary: int) -> Prepared | None:
    """The prepared folder at a path; None where there is none. Raises DataError where its tokens go beyond the vocabulary."""
    if not given or fault(given) or not any(Path(given, name).exists() for name in (MANIFEST, JOURNAL)):
        return None
    if not Path(given, JOURNAL).exists() and not is_prepared(Path(given)):
        return None
    prepared = Prepared.open(given)
    if prepared.manifest["largest_token"] >= vocabulary:
        raise DataError(
            f"data.path: '{given}' has token {prepared.manifest['largest_token']}, beyond a vocabulary of {vocabulary}; "
            f"raise model.vocabulary to {prepared.manifest['vocabulary']}, its tokenizer's, or prepare it with the model's"
        )
    return prepared


def prepared_pieces(prepared: Prepared) -> list[Piece]:
    """A piece a shard, with its mask."""
    return [
        Piece(str(shard.path), prepared.dtype, 0, shard.token_count, str(shard.mask_path) if shard.masked else "")
        for shard in prepared.shards
    ]


def nearest_document(prepared: Prepared, tokens: int) -> int:
    """The beginning or end of a document that is nearest to so many tokens, the earlier of two."""
    before, found = 0, [0]
    for shard in prepared.shards:
        at = int(np.searchsorted(shard.begins, max(tokens - before, 0)))
        found += [before + int(shard.begins[i]) for i in (at - 1, at) if 0 <= i < len(shard.begins)]
        before += shard.token_count
    return min(found, key=lambda begin: (abs(begin - tokens), begin))


def prepared_remarks(prepared: Prepared, vocabulary: int) -> Iterator[str]:
    """What a user should know, a line each."""
    own = prepared.manifest["vocabulary"]
    if own > vocabulary:
        yield (
            f"data.path: the tokenizer of '{prepared.folder}' has {own} words, more than the {vocabulary} of model.vocabulary; "
            "no token of the data is beyond these"
        )
