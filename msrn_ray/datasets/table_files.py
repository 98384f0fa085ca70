"""A manifest's file as blocks of Arrow columns: CSV, TSV, JSON Lines or Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from ..errors import UserError
from ..io.storage import Location, filesystem_of
from .text_files import decode_text

_BLOCK_BYTES = 16 << 20
_BLOCK_ROWS = 65_536
_HEAD_BYTES = 1 << 20  # the names of columns are in here


class TableFile(NamedTuple):
    """An opened table.

    Attributes:
        names: its columns, each name once but for "".
        read: the rows in their order, block by block, reduced to the columns asked for. Cells of CSV and TSV are text; cells of the
            others have the types of the file. Raises UserError for what cannot be read, with the row.
    """

    names: list[str]
    read: Callable[[Sequence[str]], Iterator[pa.Table]]


def open_table(place: Location) -> TableFile:
    """Opens the file; its suffix says what it is.

    Raises:
        UserError: if there is no such file, its suffix is not known, or it is not what the suffix says.
    """
    opener = _OPENERS.get(_suffix(place.name))
    if opener is None or not place.is_file():
        raise UserError(f"{place}: {_what_it_is(place)}")
    try:
        table = opener(place)
    except OSError as error:
        raise UserError(f"{place}: cannot be read ({' '.join(str(error).split())})") from None
    twice = [name for position, name in enumerate(table.names) if name and name in table.names[:position]]
    if twice:
        raise UserError(f"{place}: two columns are named {twice[0]!r}; rename one of them")
    return table


def parse_json_lines(data: bytes | pa.Buffer) -> pa.Table:
    """One JSON object a line; text that looks like a time stays text, which is not pyarrow's way.

    Raises:
        ValueError: if the lines are something else, or a field changes its type.
    """

    def parse(schema: pa.Schema | None) -> pa.Table:
        return pa_json.read_json(
            pa.BufferReader(data),
            pa_json.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
            pa_json.ParseOptions(explicit_schema=schema),
        )

    table = parse(None)
    listed = {field.name: pa.types.is_list(field.type) for field in table.schema}
    times = [
        pa.field(field.name, pa.list_(pa.string()) if listed[field.name] else pa.string())
        for field in table.schema
        if pa.types.is_timestamp(field.type.value_type if listed[field.name] else field.type)
    ]
    return parse(pa.schema(times)) if times else table


def _suffix(name: str) -> str:
    return "." + name.rpartition(".")[2].lower()


def _what_it_is(place: Location) -> str:
    wanted = f"a file that ends in {', '.join(_OPENERS)}"
    if place.is_dir():
        inside = [name for name in place.names() if _suffix(name) in _OPENERS]
        hint = f" (did you mean {place / inside[0]}?)" if inside else ""
        return f"is a folder; give the manifest itself, {wanted}{hint}"
    if not place.is_file():
        return f"no such file; give the manifest, {wanted}"
    return f"is no manifest by its name; give {wanted}"


def _open_csv(place: Location) -> TableFile:
    filesystem, path = filesystem_of(str(place))
    with filesystem.open_input_stream(path) as stream:
        head = _not_empty(place, stream.read(_HEAD_BYTES))
    delimiters = "\t" if _suffix(place.name) in (".tsv", ".tab") else ",;\t"  # some spreadsheets write semicolons
    headers = {delimiter: _csv_header(place, head, delimiter) for delimiter in delimiters}
    delimiter = max(headers, key=lambda one: len(headers[one]))
    header = headers[delimiter]
    names = [name.strip() for name in header]

    def read(columns: Sequence[str]) -> Iterator[pa.Table]:
        as_written = [header[names.index(column)] for column in columns]
        convert = pa_csv.ConvertOptions(
            include_columns=as_written, column_types=dict.fromkeys(as_written, pa.string()), strings_can_be_null=False
        )
        wrong: list[pa_csv.InvalidRow] = []

        def refuse(row: pa_csv.InvalidRow) -> str:
            wrong.append(row)  # an exception raised here would be lost
            return "error"

        stream = _QuoteCounter(filesystem.open_input_stream(path))
        try:
            with pa_csv.open_csv(
                stream,
                pa_csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),  # with threads no row is named
                pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=refuse),
                convert,
            ) as reader:
                for batch in reader:
                    yield pa.Table.from_batches([batch]).rename_columns(list(columns))
        except pa.ArrowInvalid as error:
            raise UserError(f"{place}{_what_is_wrong(place, wrong) or f': cannot be read as CSV ({error})'}") from None
        if stream.num_quotes % 2:  # pyarrow takes all rows from the odd one on for one text
            raise UserError(f"{place}{_ODD_QUOTES}")

    return TableFile(names, read)


class _QuoteCounter(io.RawIOBase):
    """Passes a stream's bytes on and counts the quotes in them."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self.num_quotes = 0
        self._stream = stream

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(size)
        self.num_quotes += data.count(b'"')
        return data

    def close(self) -> None:
        self._stream.close()
        super().close()


_ODD_QUOTES = ': has an odd number of quotes ("), so one is missing; write a quote in a text as ""'


def _csv_header(place: Location, head: bytes, delimiter: str) -> list[str]:
    lines = io.TextIOWrapper(io.BytesIO(head), encoding="utf-8-sig", newline="")
    try:
        return next((fields for fields in csv.reader(lines, delimiter=delimiter) if fields), [])
    except UnicodeDecodeError:
        decode_text(place, head)
        raise
    except csv.Error as error:
        raise UserError(f"{place}: the first row cannot be read as names of columns ({error}); is it a CSV?") from None


def _what_is_wrong(place: Location, rows: Sequence[pa_csv.InvalidRow]) -> str:
    """Why pyarrow stopped in the middle of a CSV, if it is one of the usual reasons."""
    data = place.read_bytes()
    decode_text(place, data)
    if data.count(b'"') % 2:
        return _ODD_QUOTES
    return _wrong_length(rows[0]) if rows else ""


def _wrong_length(row: pa_csv.InvalidRow) -> str:
    return (
        f", row {row.number - 1}: has {row.actual_columns} cells, but there are {row.expected_columns} columns"
        f" ({row.text[:80]!r}); put a cell that holds the separator in quotes"
    )


def _open_json_lines(place: Location) -> TableFile:
    data = _not_empty(place, place.read_bytes())
    try:
        table = parse_json_lines(data)
        table.validate(full=True)  # parsing takes any bytes for text
    except ValueError as error:  # pyarrow does not name the line
        raise UserError(f"{place}{_first_wrong_line(decode_text(place, data)) or f': {error}'}") from None

    def read(columns: Sequence[str]) -> Iterator[pa.Table]:
        return (pa.Table.from_batches([batch]) for batch in table.select(columns).to_batches())

    return TableFile(table.column_names, read)


def _first_wrong_line(text: str) -> str:
    """Where and why pyarrow refused lines of JSON."""
    kinds: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            return f", line {number}: is not JSON ({error}); write one object a line, nothing else"
        if not isinstance(entry, dict):
            return (
                f', line {number}: is no JSON object; write one a line, such as {{"image": "a.jpg", "labels": ["dog"]}}'
            )
        for field, value in entry.items():
            kind = _JSON_KINDS[type(value)]
            before, first = kinds.setdefault(field, (kind, number)) if value is not None else (kind, number)
            if kind != before:
                return (
                    f", line {number}: {field!r} is {kind}, but {before} in line {first}; write it alike in all lines"
                )
    return ""


_JSON_KINDS: dict[type, str] = {
    **{str: "a text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"},
    **{int: "a number", float: "a number"},
}


def _open_parquet(place: Location) -> TableFile:
    filesystem, path = filesystem_of(str(place))
    try:
        file = pq.ParquetFile(filesystem.open_input_file(path))
    except pa.ArrowInvalid as error:
        raise UserError(f"{place}: is not a whole Parquet file ({error}); write or download it again") from None

    def read(columns: Sequence[str]) -> Iterator[pa.Table]:
        try:
            for batch in file.iter_batches(_BLOCK_ROWS, columns=list(columns), use_threads=False):
                table = pa.Table.from_batches([batch]).select(list(columns))
                table.validate(full=True)  # Parquet takes any bytes for text
                yield table
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{place}: cannot be read ({' '.join(str(error).split())[:300]}); write it again") from None

    return TableFile(file.schema_arrow.names, read)


def _not_empty(place: Location, data: bytes) -> bytes:
    if not data or data.isspace():
        raise UserError(f"{place}: is empty; write a row for each image")
    return data


_OPENERS: dict[str, Callable[[Location], TableFile]] = {
    **dict.fromkeys((".csv", ".tsv", ".tab"), _open_csv),
    **dict.fromkeys((".jsonl", ".ndjson"), _open_json_lines),
    **dict.fromkeys((".parquet", ".pq"), _open_parquet),
}
