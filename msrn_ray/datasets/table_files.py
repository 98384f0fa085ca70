"""Reads the table of a manifest as blocks of Arrow columns: CSV, TSV, JSON Lines or Parquet."""

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
from ..io.filesystems import filesystem_of
from ..io.storage import Location
from .text_files import decode_text

_BLOCK_BYTES = 16 << 20
_BLOCK_ROWS = 65_536
_HEAD_BYTES = 1 << 20  # enough for the header


class TableFile(NamedTuple):
    """An opened table.

    Attributes:
        names: its columns; only "" may repeat.
        read: yields the rows in their order, block by block, with the given columns only. Cells of CSV and TSV are text. Cells of JSON
            Lines and Parquet keep the types of the file. Raises UserError with the row if the file cannot be read.
    """

    names: list[str]
    read: Callable[[Sequence[str]], Iterator[pa.Table]]


def open_table(file: Location) -> TableFile:
    """Open a table in the format of its suffix.

    Raises:
        UserError: if the file is missing, its suffix is unknown, or its content has another format.
    """
    opener = _OPENERS.get(_suffix(file.name))
    if opener is None or not file.is_file():
        raise UserError(f"{file}: {_why_not_a_table(file)}")
    try:
        table = opener(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())})") from None
    repeated = [name for position, name in enumerate(table.names) if name and name in table.names[:position]]
    if repeated:
        raise UserError(f"{file}: two columns are named {repeated[0]!r}; rename one of them")
    return table


def parse_json_lines(data: bytes | pa.Buffer) -> pa.Table:
    """Parse one JSON object per line. Text that looks like a time stays text, unlike in pyarrow's own types.

    Raises:
        ValueError: if a line is no JSON object, or a field changes its type.
    """

    def parse(schema: pa.Schema | None) -> pa.Table:
        return pa_json.read_json(
            pa.BufferReader(data),
            pa_json.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
            pa_json.ParseOptions(explicit_schema=schema),
        )

    table = parse(None)
    times = [
        field.with_type(pa.list_(pa.string()) if pa.types.is_list(field.type) else pa.string())
        for field in table.schema
        if pa.types.is_timestamp(field.type.value_type if pa.types.is_list(field.type) else field.type)
    ]
    return parse(pa.schema(times)) if times else table


def _suffix(name: str) -> str:
    return "." + name.rpartition(".")[2].lower()


_CONVERTED = {
    (".xlsx", ".xls", ".ods"): "is a spreadsheet; save the sheet as 'CSV UTF-8'",
    (".gz", ".zip", ".bz2", ".xz", ".zst"): "is compressed; unpack it",
}


def _why_not_a_table(file: Location) -> str:
    wanted = f"a file that ends in {', '.join(_OPENERS)}"
    if file.is_dir():
        inside = [name for name in file.names() if _suffix(name) in _OPENERS]
        suggestion = f" (did you mean {file / inside[0]}?)" if inside else ""
        return f"is a folder; give the manifest itself, {wanted}{suggestion}"
    if not file.is_file():
        return f"no such file; give the manifest, {wanted}"
    for suffixes, fix in _CONVERTED.items():
        if file.name.lower().endswith(suffixes):
            return f"{fix}, then give {wanted}"
    return f"has no suffix of a manifest; give {wanted}"


def _open_csv(file: Location) -> TableFile:
    filesystem, path = filesystem_of(str(file))
    with filesystem.open_input_stream(path) as stream:
        head = _not_empty(file, stream.read(_HEAD_BYTES))
    first = head.removeprefix(b"\xef\xbb\xbf").splitlines()[0].strip()
    if first.lower().startswith(b"sep=") or first.startswith(b"#"):
        raise UserError(
            f"{file}, line 1: {first[:80].decode(errors='replace')!r} names no columns; delete the lines above the column names"
        )
    delimiters = "\t" if _suffix(file.name) in (".tsv", ".tab") else ",;\t"  # some spreadsheets write semicolons
    headers = {delimiter: _csv_header(file, head, delimiter) for delimiter in delimiters}
    delimiter = max(headers, key=lambda candidate: len(headers[candidate]))
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
                # With threads, pyarrow reports no row number.
                pa_csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
                pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=refuse),
                convert,
            ) as reader:
                for batch in reader:
                    yield pa.Table.from_batches([batch]).rename_columns(list(columns))
        except pa.ArrowInvalid as error:
            reason = _why_csv_stopped(file, wrong) or f": cannot be read as CSV ({error})"
            raise UserError(f"{file}{reason}") from None
        if stream.num_quotes % 2:  # pyarrow reads all rows after an unpaired quote as one text
            raise UserError(f"{file}{_ODD_QUOTES}")

    return TableFile(names, read)


class _QuoteCounter(io.RawIOBase):
    """A stream that counts the quotes in the bytes it passes on."""

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


def _csv_header(file: Location, head: bytes, delimiter: str) -> list[str]:
    lines = io.TextIOWrapper(io.BytesIO(head), encoding="utf-8-sig", newline="")
    try:
        return next((fields for fields in csv.reader(lines, delimiter=delimiter) if fields), [])
    except UnicodeDecodeError:
        decode_text(file, head)
        raise
    except csv.Error as error:
        raise UserError(f"{file}: the first row cannot be read as a header ({error}); is the file a CSV?") from None


def _why_csv_stopped(file: Location, rows: Sequence[pa_csv.InvalidRow]) -> str:
    """Return why pyarrow stopped in the middle of a CSV, "" if the reason is unknown."""
    data = file.read_bytes()
    decode_text(file, data)
    if data.count(b'"') % 2:
        return _ODD_QUOTES
    if not rows:
        return ""
    row = rows[0]
    return (
        f", row {row.number - 1}: has {row.actual_columns} cells, but there are {row.expected_columns} columns"
        f" ({row.text[:80]!r}); put a cell that holds the separator in quotes"
    )


def _open_json_lines(file: Location) -> TableFile:
    data = _not_empty(file, file.read_bytes())
    try:
        table = parse_json_lines(data)
        table.validate(full=True)  # the parser accepts any bytes as text
    except ValueError as error:  # pyarrow reports no line number
        raise UserError(f"{file}{_first_wrong_line(decode_text(file, data)) or f': {error}'}") from None

    def read(columns: Sequence[str]) -> Iterator[pa.Table]:
        return (pa.Table.from_batches([batch]) for batch in table.select(columns).to_batches())

    return TableFile(table.column_names, read)


def _first_wrong_line(text: str) -> str:
    """Return where and why pyarrow refused lines of JSON."""
    kinds: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            return f", line {number}: is not JSON ({error}); write one object per line, nothing else"
        if not isinstance(entry, dict):
            return f', line {number}: is no JSON object; write one per line, such as {{"image": "a.jpg", "labels": ["dog"]}}'
        for field, value in entry.items():
            kind = _JSON_KINDS[type(value)]
            before, first = kinds.setdefault(field, (kind, number)) if value is not None else (kind, number)
            if kind != before:
                return (
                    f", line {number}: {field!r} is {kind}, but {before} in line {first};"
                    " write the same type in all lines"
                )
    return ""


_JSON_KINDS: dict[type, str] = {
    **{str: "a text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"},
    **{int: "a number", float: "a number"},
}


def _open_parquet(file: Location) -> TableFile:
    filesystem, path = filesystem_of(str(file))
    try:
        parquet = pq.ParquetFile(filesystem.open_input_file(path))
    except pa.ArrowInvalid as error:
        raise UserError(f"{file}: is not a whole Parquet file ({error}); write or download it again") from None

    def read(columns: Sequence[str]) -> Iterator[pa.Table]:
        try:
            for batch in parquet.iter_batches(_BLOCK_ROWS, columns=list(columns), use_threads=False):
                table = pa.Table.from_batches([batch]).select(list(columns))
                table.validate(full=True)  # Parquet accepts any bytes as text
                yield table
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())[:300]}); write it again") from None

    return TableFile(parquet.schema_arrow.names, read)


def _not_empty(file: Location, data: bytes) -> bytes:
    if not data or data.isspace():
        raise UserError(f"{file}: is empty; write one row per image")
    return data


_OPENERS: dict[str, Callable[[Location], TableFile]] = {
    **dict.fromkeys((".csv", ".tsv", ".tab"), _open_csv),
    **dict.fromkeys((".jsonl", ".ndjson"), _open_json_lines),
    **dict.fromkeys((".parquet", ".pq"), _open_parquet),
}
