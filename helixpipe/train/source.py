"""A source: the tokens below one path, where its documents end, and the share of them that is never trained on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from helixpipe.config_data import DataConfig
from helixpipe.data.formats import holds_tokens
from helixpipe.data.megatron_index import index_of
from helixpipe.data.prepared import Megatron, Prepared
from helixpipe.errors import DataError
from helixpipe.train.pieces import Piece, Tokens
from helixpipe.train.prepared import nearest_document, open_prepared, prepared_pieces, prepared_remarks
from helixpipe.train.token_files import as_piece, check_vocabulary, file_remarks, find_files

_TEXT, _UNTOLD = "text, read as bytes", "tokens of a tokenizer that is not told"


@dataclass(frozen=True)
class Source:
    """Training and held-out tokens, each a run of its own; `ends`: where the documents of each end, None where nobody asks."""

    name: str
    """Its path, or what stands for it."""
    training: Tokens
    held_out: Tokens
    training_ends: NDArray[np.int64] | None
    held_out_ends: NDArray[np.int64] | None
    words: str
    """What its ids are of, in words: sources of one run must agree."""
    remarks: tuple[str, ...]

    @property
    def named(self) -> str:
        """As messages call it."""
        return f"data.path: {self.name}"


def open_source(path: str, data: DataConfig, vocabulary: int, by_documents: bool) -> Source:
    """The source at a path; "" is Python's standard library. Raises DataError for data that cannot be trained on."""
    name = f"'{path}'" if path else "the Python standard library"
    prepared = open_prepared(path, vocabulary)
    files, left_out = ([], "") if prepared else find_files(path)
    pieces = prepared_pieces(prepared) if prepared else [as_piece(file, data, vocabulary) for file in files]
    count = sum(piece.tokens for piece in pieces)
    if not count:
        raise DataError(
            f"data.path: {name} is empty; give a file or folder with text or tokens{left_out and f' ({left_out})'}"
        )
    if not prepared:
        check_vocabulary(pieces, vocabulary)
    trained = round(count * (1 - data.held_out))
    ends = None
    if by_documents:
        ends = np.cumsum(prepared.lengths) if prepared else _ends(pieces)
        trained = int(min([0, *ends[_around(ends, trained)]], key=lambda end: (abs(end - trained), end)))
    elif prepared:
        trained = nearest_document(prepared, trained)
    training, held_out = _split(pieces, trained)
    until = 0 if ends is None else int(np.searchsorted(ends, trained, "right"))
    remarks = prepared_remarks(prepared, vocabulary) if prepared else file_remarks(pieces, vocabulary, left_out)
    return Source(
        name,
        training,
        held_out,
        None if ends is None else ends[:until],
        None if ends is None else ends[until:] - trained,
        _words(prepared, pieces),
        tuple(remarks),
    )


def check_mixture(sources: Sequence[Source]) -> None:
    """Raise DataError where sources are known to be of different vocabularies."""
    for one, other in itertools.combinations(sources, 2):
        if one.words != other.words and not _may_agree(one, other):
            raise DataError(
                f"{other.named} is {other.words}, and {one.name} is {one.words}; prepare them with one tokenizer"
            )


def _may_agree(one: Source, other: Source) -> bool:
    return _UNTOLD in (one.words, other.words) and _TEXT not in (one.words, other.words)


def _words(prepared: Prepared | None, pieces: Sequence[Piece]) -> str:
    if prepared:
        return f"tokens of the tokenizer {str(prepared.manifest['tokenizer']['digest'])[:19]}"
    return _UNTOLD if holds_tokens(pieces[0].path) else _TEXT


def _around(ends: NDArray[np.int64], tokens: int) -> slice:
    """The ends of documents just below and above so many tokens."""
    at = int(np.searchsorted(ends, tokens))
    return slice(max(at - 1, 0), at + 1)


def _ends(pieces: Sequence[Piece]) -> NDArray[np.int64]:
    """Where documents end: those of Megatron's index, and a file of text is one."""
    found, before = [], 0
    for piece in pieces:
        path = Path(piece.path)
        if not holds_tokens(path):
            ends = np.array([piece.tokens])
        elif path.suffix.lower() == ".bin" and index_of(path) is not None:
            ends = np.cumsum(Megatron.open(path).lengths)
        else:
            raise DataError(
                f"data.path: '{path}' does not say where its documents end; give what helixpipe prepare wrote, a .bin with "
                "its .idx or text, or leave data.packing and data.document_mask out"
            )
        found.append(before + ends)
        before += piece.tokens
    return np.concatenate(found)


def _split(pieces: Sequence[Piece], left: int) -> tuple[Tokens, Tokens]:
    """Training, which has `left` tokens, and held-out: the tail, cut from the file where it begins."""
    training: list[Piece] = []
    held_out: list[Piece] = []
    for piece in pieces:
        kept = min(left, piece.tokens)
        left -= kept
        after_bytes = piece.offset_bytes + kept * np.dtype(piece.dtype).itemsize
        training.append(piece._replace(tokens=kept))
        held_out.append(piece._replace(offset_bytes=after_bytes, tokens=piece.tokens - kept))
    return Tokens([piece for piece in training if piece.tokens]), Tokens([piece for piece in held_out if piece.tokens])
