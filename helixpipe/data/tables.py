"""Rows of Parquet and Arrow files: groups of rows that can be read by themselves, and their fields."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from helixpipe.data.extras import needed
from helixpipe.errors import DataError

_ROWS_AT_A_TIME = 256


class Group(NamedTuple):
    """Rows that are read together: Parquet's row group, Arrow's batch."""

    number: int
    first_row: int
    size_bytes: int


def groups(path: str, kind: str, fields: Sequence[str], conversation: bool) -> list[Group]:
    """The groups of a table; raises DataError where it has not the fields, or they are no text (or conversation)."""
    table = _open(path, kind)
    _check(path, table.schema, fields, conversation)
    found, row = [], 0
    for number in range(table.count):
        rows, size_bytes = table.about(number)
        found.append(Group(number, row, size_bytes))
        row += rows
    return found


def rows(path: str, kind: str, start: int, stop: int, fields: Sequence[str]) -> Iterator[tuple[float, dict[str, Any]]]:
    """(share done, record) of the groups [start, stop)."""
    table = _open(path, kind)
    try:
        for number in range(start, stop):
            count, done = max(table.about(number)[0], 1), 0
            for batch in table.batches(number, list(fields)):
                for begin in range(0, batch.num_rows, _ROWS_AT_A_TIME):
                    for record in batch.slice(begin, _ROWS_AT_A_TIME).to_pylist():
                        done += 1
                        yield (number - start + done / count) / (stop - start), record
    except (table.fault, OSError) as error:
        raise DataError(f"'{path}' is damaged: {_first_line(error)}") from None


class _Parquet:
    def __init__(self, path: str) -> None:
        pyarrow, parquet = needed("pyarrow", f"'{path}'"), needed("pyarrow.parquet", f"'{path}'")
        self.fault = pyarrow.ArrowException
        # buffered, so that a group of rows larger than memory is read piece by piece
        self._file = parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
        self.schema = self._file.schema_arrow
        self.count = self._file.num_row_groups

    def about(self, number: int) -> tuple[int, int]:
        group = self._file.metadata.row_group(number)
        return group.num_rows, group.total_byte_size

    def batches(self, number: int, fields: list[str]) -> Iterator[Any]:
        yield from self._file.iter_batches(_ROWS_AT_A_TIME, row_groups=[number], columns=fields, use_threads=False)


class _Arrow:
    def __init__(self, path: str) -> None:
        pyarrow, ipc = needed("pyarrow", f"'{path}'"), needed("pyarrow.ipc", f"'{path}'")
        self.fault = pyarrow.ArrowException
        self._file = pyarrow.memory_map(path)
        magic, _ = self._file.read(6), self._file.seek(0)
        if magic == b"ARROW1":
            reader = ipc.open_file(self._file)
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        else:  # a stream, as datasets are saved; batches are views of the mapped file
            reader = ipc.open_stream(self._file)
            self._batches = list(reader)
        self.schema, self.count = reader.schema, len(self._batches)

    def about(self, number: int) -> tuple[int, int]:
        return self._batches[number].num_rows, self._batches[number].nbytes

    def batches(self, number: int, fields: list[str]) -> Iterator[Any]:
        yield self._batches[number].select(fields)


def _open(path: str, kind: str) -> Any:
    pyarrow = needed("pyarrow", f"'{path}'")
    try:
        return _Parquet(path) if kind == "parquet" else _Arrow(path)
    except (pyarrow.ArrowException, OSError) as error:
        name = "Parquet" if kind == "parquet" else "Arrow"
        raise DataError(f"'{path}' cannot be read as {name}: {_first_line(error)}") from None


def _check(path: str, schema: Any, fields: Sequence[str], conversation: bool) -> None:
    types = needed("pyarrow", f"'{path}'").types
    for name in fields:
        found = schema.get_all_field_indices(name)
        if len(found) != 1:
            known = ", ".join(f"'{each}'" for each in schema.names)
            has = f"has the column '{name}' more than once" if found else f"has no column '{name}'"
            raise DataError(f"'{path}' {has}; it has {known}; name the column (see --text)")
        kind = schema.field(name).type
        inner = kind.value_type if types.is_dictionary(kind) else kind
        if conversation:
            fits = types.is_list(inner) or types.is_large_list(inner)
        else:
            fits = types.is_string(inner) or types.is_large_string(inner) or types.is_string_view(inner)
        if not fits:
            wanted = "a list of messages" if conversation else "text"
            raise DataError(f"'{path}': column '{name}' is {kind}, not {wanted}; name another column")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
