"""Reads folders of Hugging Face `datasets` without that package: `save_to_disk` (Arrow files, `state.json`), or Parquet files.

Images stay where they are. In Arrow files the uri of a row is the range of bytes; in Parquet files, where they may be compressed, it is
the row of a row group, good to read in order (`msrn prepare`) and slow to train from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from ..errors import UserError
from ..io.byte_ranges import parquet_uris, range_uris
from ..io.storage import Location
from ..types import SampleTable
from .containers import LABEL_FIELDS, build_tables, by_split, split_of
from .text_files import hint, read_json

_ID_FIELDS = ("image_id", "id")
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of a stream that was written to its end
_AGAIN = "save the data set again"
_IMAGE_FIELDS = ("image", "img", "jpg", "picture")


class _Columns(NamedTuple):
    """Which columns are what, and the names that numbers in the label column stand for."""

    image: str
    label: str
    image_id: str | None
    names: tuple[str, ...] | None


class _Rows(NamedTuple):
    """Some rows: uris [n], labels a row [n], labels one behind the other, ids [n] or None."""

    uris: pa.StringArray
    num_labels: npt.NDArray[np.int64]
    labels: pa.StringArray
    image_ids: pa.StringArray | None


def read_huggingface(
    root: Location,
    *,
    label_names: tuple[str, ...] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> dict[str, SampleTable]:
    """Reads all splits of a folder.

    Args:
        root: what `save_to_disk` wrote (a data set or a dictionary of splits), or a folder of Parquet files whose names or folders begin
            with train, val (valid, validation, dev) or test.
        label_names: labels in the order wanted; None for the features' own order, else all that occur, in alphabetical order.
        image_column: a column of encoded images; None for the one column of that kind.
        label_column: a column of a label or a list of labels, as names or numbers of the features' names, nested ones dotted
            (`objects.category`); None: labels, label, tags, classes or categories.

    Returns:
        split -> n rows in the order of the files; image_id is the column `image_id` or `id`, else `<split>/<number of the row>`; targets
        in {1, 0}.

    Raises:
        UserError: if this is no such folder, a file is damaged, or columns are not there or not clear.
    """
    parts: dict[str, tuple[pa.StringArray, pa.StringArray, npt.NDArray[np.int64], pa.StringArray]] = {}
    orders: list[tuple[str, ...] | None] = []
    for split, files in _files(root).items():
        rows: list[_Rows] = []
        for file in files:
            try:
                # Mapped into memory, images are not read: only where they lie counts.
                with pa.memory_map(file.text) if file.is_local else file.opened_input() as stream:
                    read = _parquet_rows if file.name.endswith(".parquet") else _arrow_rows
                    for columns, part in read(file, stream, image_column, label_column, label_names):
                        orders.append(columns.names)
                        rows.append(part)
            except (OSError, pa.ArrowException) as error:
                what = " ".join(str(error).split())[:200]
                raise UserError(f"{file}: cannot be read ({what}); download or write it again") from None
        if not rows:
            raise UserError(f"{root}: the {split} split holds no image")
        uris, labels = (pa.chunked_array([part[column] for part in rows], pa.string()) for column in (0, 2))
        ids = [part.image_ids for part in rows if part.image_ids is not None]
        image_ids = (
            pa.chunked_array(ids, pa.string()).combine_chunks()
            if len(ids) == len(rows)
            else _numbered(split, len(uris))
        )
        num_labels = np.concatenate([part.num_labels for part in rows])
        parts[split] = (image_ids, uris.combine_chunks(), num_labels, labels.combine_chunks())
    names = orders[0] if label_names is None and len(set(orders)) == 1 else label_names
    return build_tables(parts, names, root)


def _numbered(split: str, num_rows: int) -> pa.StringArray:
    """[num_rows] ids that no other split has."""
    rows = pc.utf8_lpad(pa.array(np.arange(num_rows)).cast(pa.string()), 8, "0")
    return pc.binary_join_element_wise(split, rows, "/")


def _files(root: Location) -> dict[str, list[Location]]:
    """split -> its files in order."""
    if (root / "dataset_dict.json").is_file():
        named = read_json(root / "dataset_dict.json", _AGAIN).get("splits", [])
        unknown = [name for name in named if split_of(str(name)) is None or "/" in str(name)]
        if unknown or "train" not in map(split_of, named):
            raise UserError(f"{root / 'dataset_dict.json'}: splits must be called train, val or test, not {named}")
        found: dict[str, list[Location]] = {}
        for name in named:
            found.setdefault(str(split_of(name)), []).extend(_saved(root / name))
        return found
    if (root / "state.json").is_file():
        return {"train": _saved(root)}
    files = [name for name in root.names(recursive=True, missing_ok=True) if name.endswith(".parquet")]
    if not files:
        what = "holds no dataset_dict.json, state.json or .parquet" if root.is_dir() else "no such folder"
        raise UserError(
            f"{root}: {what}; give the folder that `save_to_disk` wrote, or one of Parquet files{hint(root, _is_saved)}"
        )
    return {split: [root / name for name in names] for split, names in by_split(root, files).items()}


def _is_saved(folder: Location) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved(folder: Location) -> list[Location]:
    state = read_json(folder / "state.json", _AGAIN)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(f"{folder}: saved as a selection of other rows; call flatten_indices() before save_to_disk()")
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise UserError(f"{folder / 'state.json'}: has no list of _data_files; save the data set again") from None
    for name in names:
        if "/" in name:
            raise UserError(f"{folder / 'state.json'}: the file {name!r} leads out of the folder; make it a name in it")
    return [folder / name for name in names]


def _arrow_rows(
    file: Location, stream: pa.NativeFile, image: str | None, label: str | None, given: Sequence[str] | None
) -> Iterator[tuple[_Columns, _Rows]]:
    """A record batch at a time. Message by message, so that the place of a batch in the file is known."""
    stream.seek(stream.size() - len(_END))
    if stream.read() != _END:
        raise UserError(f"{file}: cut off; download or write it again")
    stream.seek(0)
    messages = pa.ipc.MessageReader.open_stream(stream)
    schema = pa.ipc.read_schema(messages.read_next_message())
    columns = _choose_columns(file, schema, image, label)
    for message in iter(lambda: _next(messages), None):
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)  # of a stranger's file: lists that end outside of it are read as they are otherwise
        table = _flat(pa.Table.from_batches([batch]))
        if table.num_rows == 0:
            continue
        images = table[columns.image].chunk(0)  # where it lies in the message; other ways to an array may copy
        _require_bytes(file, columns.image, images)
        _, ends, data = images.buffers()
        inside = data.address - message.body.address
        if not 0 <= inside < message.body.size:
            raise UserError(f"{file}: its Arrow buffers are compressed; write it again without compression")
        first = stream.tell() - message.body.size + inside
        kind = np.int64 if pa.types.is_large_binary(images.type) else np.int32
        offsets = np.frombuffer(ends, kind)[images.offset : images.offset + len(images) + 1].astype(np.int64)
        uris = range_uris(file, first + offsets[:-1], np.diff(offsets))
        yield columns, _rows(file, table, columns, uris, given)


def _next(messages: pa.ipc.MessageReader) -> pa.ipc.Message | None:
    try:
        return messages.read_next_message()
    except StopIteration:
        return None


def _parquet_rows(
    file: Location, stream: pa.NativeFile, image: str | None, label: str | None, given: Sequence[str] | None
) -> Iterator[tuple[_Columns, _Rows]]:
    """A row group at a time, without its images; of the first one they are read, to see that they are there."""
    parquet = pq.ParquetFile(stream)
    columns = _choose_columns(file, parquet.schema_arrow, image, label)
    wanted = [name for name in (columns.label, columns.image_id) if name is not None]
    for group in range(parquet.num_row_groups):
        if group == 0:
            first = _flat(parquet.read_row_group(group, columns=[columns.image]))
            _require_bytes(file, columns.image, first[columns.image])
        table = _flat(parquet.read_row_group(group, columns=wanted))
        table.validate(full=True)  # Parquet takes any bytes for text
        uris = parquet_uris(file, group, table.num_rows, columns.image)
        yield columns, _rows(file, table, columns, uris, given)


def _flat(table: pa.Table) -> pa.Table:
    """Structs as dotted columns."""
    while any(pa.types.is_struct(field.type) for field in table.schema):
        table = table.flatten()
    return table


def _require_bytes(file: Location, column: str, images: pa.Array) -> None:
    empty = pc.equal(pc.fill_null(pc.binary_length(images), 0), 0)
    if pc.any(empty).as_py():
        raise UserError(
            f"{file}: row {pc.index(empty, True).as_py()} of a batch has no {column}, perhaps only a path;"
            " `save_to_disk` of the loaded data set puts the bytes in"
        )


def _rows(file: Location, table: pa.Table, columns: _Columns, uris: pa.Array, given: Sequence[str] | None) -> _Rows:
    column = table[columns.label].combine_chunks()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        num_labels = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        flat = column.flatten()
    else:
        num_labels, flat = np.ones(len(column), np.int64), column
    known = flat.is_valid()
    if pa.types.is_integer(flat.type):
        names = columns.names or given
        if names is None:
            raise UserError(
                f"{file}: {columns.label} holds numbers without names; name them in a text file (data.labels), one a line"
            )
        flat = flat.cast(pa.int64())
        known = pc.greater_equal(pc.fill_null(flat, -1), 0)  # -1 is how `datasets` writes "no label"
        most = pc.max(flat).as_py()
        if most is not None and most >= len(names):
            raise UserError(
                f"{file}: {columns.label} holds {most}, but there are {len(names)} names (0 to {len(names) - 1})"
            )
        flat = pa.array(names, pa.string()).take(pc.if_else(known, flat, 0))
    elif not (pa.types.is_string(flat.type) or pa.types.is_large_string(flat.type)):
        raise UserError(
            f"{file}: {columns.label} is {column.type}; a label or a list of labels is due, as text or whole numbers"
        )
    else:
        flat = pc.utf8_trim_whitespace(flat)
        known = pc.fill_null(pc.not_equal(flat, ""), False)
    rows = np.repeat(np.arange(len(num_labels)), num_labels)[known.to_numpy(zero_copy_only=False)]
    image_ids = None if columns.image_id is None else table[columns.image_id].cast(pa.string()).combine_chunks()
    if image_ids is not None and image_ids.null_count:
        row = pc.index(image_ids.is_null(), True).as_py()
        raise UserError(f"{file}: row {row} of a batch has no {columns.image_id}; fill it in, or take the column away")
    return _Rows(uris, np.bincount(rows, minlength=len(num_labels)), flat.filter(known).cast(pa.string()), image_ids)


def _choose_columns(file: Location, schema: pa.Schema, image: str | None, label: str | None) -> _Columns:
    flat = _flat(schema.empty_table()).schema
    binary = [one.name for one in flat if pa.types.is_binary(one.type) or pa.types.is_large_binary(one.type)]
    images = [name for name in (image, f"{image}.bytes") if name in binary] if image else binary
    if image is None and len(binary) > 1:
        images = [name for name in binary if name.removesuffix(".bytes") in _IMAGE_FIELDS]
    labels = [name for name in ((label,) if label else LABEL_FIELDS) if name in flat.names]
    for what, setting, found, asked in (
        ("image", "image_column", images, image),
        ("label", "label_column", labels, label),
    ):
        if len(found) != 1:
            wrong = f"no {what} column {asked!r}" if asked else f"{len(found)} columns that may be the {what}'s"
            raise UserError(f"{file}: {wrong}; name one of {', '.join(flat.names)} with data.{setting}")
    image_id = next((name for name in _ID_FIELDS if name in flat.names), None)
    return _Columns(images[0], labels[0], image_id, _class_names(schema, labels[0]))


def _class_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """The names of a column of class numbers, from the features that `datasets` keeps in the schema."""
    try:
        feature: Any = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        for part in column.split("."):
            feature = _element(feature)[part]
        feature = _element(feature)
        return tuple(feature["names"]) if feature.get("_type") == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None  # written by others: labels are then texts, or data.labels names them


def _element(feature: Any) -> Any:
    """What a list feature lists; lists are written as [feature], or as {"feature": ..., "_type": "Sequence" or "List"}."""
    while isinstance(feature, list) or (
        isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List", "LargeList")
    ):
        feature = feature[0] if isinstance(feature, list) else feature["feature"]
    return feature
