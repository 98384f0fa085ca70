"""Reads folders of Hugging Face `datasets` without that package: `save_to_disk` (Arrow files, `state.json`), or Parquet files.

Images stay where they are. In Arrow files, the uri of an image is a range of bytes. In Parquet files, images may be compressed, so the uri
is a row of a row group: fast to read in order (`msrn prepare`), slow to train from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from ..errors import UserError
from ..io.byte_ranges import parquet_uris, range_uris
from ..io.storage import Location
from ..types import SampleTable
from .containers import LABEL_FIELDS, LABELLED_IMAGES, build_tables, by_split, split_of
from .label_columns import is_list
from .manifest import ID_COLUMNS, NamedColumns
from .split_names import SplitName
from .text_files import read_json, suggest_folder

_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # missing if writing the Arrow stream stopped early
_SAVED = ("dataset_dict.json", "state.json")  # a folder that `save_to_disk` wrote holds one of them
_SAVE_AGAIN = "save the data set again"
_IMAGE_FIELDS = ("image", "img", "jpg", "picture")


class _Columns(NamedTuple):
    """The role of each column, and the names that numbers in the label column stand for."""

    image: str
    label: str
    image_id: str | None
    group: str | None
    label_names: tuple[str, ...] | None


# Blocks of n rows: their cells, and the uris of their images
_Blocks: TypeAlias = Iterator[tuple[_Columns, pa.Table, pa.StringArray]]


def read_huggingface(
    root: Location,
    *,
    label_names: tuple[str, ...] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
) -> dict[SplitName, SampleTable]:
    """Read all splits of a folder.

    Args:
        root: what `save_to_disk` wrote (a data set or a dictionary of splits), or a folder of Parquet files whose names or folders begin
            with train, val (valid, validation, dev) or test.
        label_names: labels in the requested order; None: the order of the features, else all that occur, in alphabetical order.
        image_column: a column of encoded images; None: the only column of this kind.
        label_column: a column with a label or a list of labels per row, as names or as numbers of the features' names. Nested columns are
            dotted (`objects.category`). None: one of `LABEL_FIELDS`.
        group_column: a column of groups, texts or whole numbers; None: the images have no groups.

    Returns:
        split -> n rows in the order of the files; image_id is the column `image_id` or `id`, else `<split>/<number of the row>`; targets
        in {1, 0}.

    Raises:
        UserError: if this is no such folder, a file is damaged, or columns are missing or ambiguous.
    """
    named = NamedColumns(image_column, label_column, group_column)
    parts: dict[SplitName, pa.Table] = {}
    orders: set[tuple[str, ...] | None] = set()
    for split, files in _files_by_split(root).items():
        rows: list[pa.Table] = []
        for file in files:
            try:
                # A memory map leaves the images on disk: only their position in the file is needed.
                with pa.memory_map(file.text) if file.is_local else file.opened_input() as stream:
                    read = _parquet_rows if file.name.endswith(".parquet") else _arrow_rows
                    for columns, cells, uris in read(file, stream, named):
                        orders.add(columns.label_names)
                        rows.append(_rows(file, cells, columns, uris, label_names))
            except (OSError, pa.ArrowException) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"{file}: cannot be read ({reason}); download or write it again") from None
        if not rows:
            raise UserError(f"{root}: the {split} split holds no image")
        parts[split] = _with_ids(split, pa.concat_tables(rows))
    if label_names is None and len(orders) == 1:
        (label_names,) = orders
    return build_tables(parts, label_names, root)


def _with_ids(split: SplitName, images: pa.Table) -> pa.Table:
    """Return the images of a split. If a file has no ids, all images get ids that no other split has."""
    if not images["image_id"].null_count:
        return images
    numbers = pc.utf8_lpad(pa.array(np.arange(len(images))).cast(pa.string()), 8, "0")
    return images.set_column(0, "image_id", pc.binary_join_element_wise(split, numbers, "/"))


def _files_by_split(root: Location) -> dict[SplitName, list[Location]]:
    """Return the files of each split in their order."""
    if (root / "dataset_dict.json").is_file():
        names = [str(name) for name in read_json(root / "dataset_dict.json", _SAVE_AGAIN).get("splits", [])]
        splits = [None if "/" in name else split_of(name) for name in names]
        if None in splits or "train" not in splits:
            raise UserError(f"{root / 'dataset_dict.json'}: splits must be called train, val or test, not {names}")
        return {
            split: [file for folder in folders for file in _saved_files(root / folder)]
            for split, folders in by_split(root, names).items()
        }
    if (root / "state.json").is_file():
        return {"train": _saved_files(root)}
    files = [name for name in root.names(recursive=True, missing_ok=True) if name.endswith(".parquet")]
    if not files:
        what = "holds no dataset_dict.json, state.json or .parquet" if root.is_dir() else "no such folder"
        suggestion = suggest_folder(root, lambda folder: any((folder / name).is_file() for name in _SAVED))
        raise UserError(
            f"{root}: {what}; give the folder that `save_to_disk` wrote, or a folder of Parquet files{suggestion}"
        )
    return {split: [root / name for name in names] for split, names in by_split(root, files).items()}


def _saved_files(folder: Location) -> list[Location]:
    state = read_json(folder / "state.json", _SAVE_AGAIN)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(f"{folder}: saved as a selection of other rows; call flatten_indices() before save_to_disk()")
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError):
        raise UserError(f"{folder / 'state.json'}: has no list of _data_files; {_SAVE_AGAIN}") from None
    for name in names:
        if "/" in name:
            raise UserError(f"{folder / 'state.json'}: the file {name!r} leads out of the folder; make it a name in it")
    return [folder / name for name in names]


def _arrow_rows(file: Location, stream: pa.NativeFile, named: NamedColumns) -> _Blocks:
    """Yield the rows of each record batch. Reading message by message gives the position of a batch in the file."""
    stream.seek(stream.size() - len(_END_OF_STREAM))
    if stream.read() != _END_OF_STREAM:
        raise UserError(f"{file}: cut off; download or write it again")
    stream.seek(0)
    messages = pa.ipc.MessageReader.open_stream(stream)
    schema = pa.ipc.read_schema(messages.read_next_message())
    columns = _choose_columns(file, schema, named)
    for message in messages:
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)  # untrusted file: without this, a list that ends outside of it reads other memory
        table = _flat(pa.Table.from_batches([batch]))
        if table.num_rows == 0:
            continue
        images = table[columns.image].chunk(0)  # keeps its address in the message; combine_chunks may copy
        _require_bytes(file, columns.image, images)
        _, ends, data = images.buffers()
        inside = data.address - message.body.address
        if not 0 <= inside < message.body.size:
            raise UserError(f"{file}: its Arrow buffers are compressed; write it again without compression")
        first = stream.tell() - message.body.size + inside
        offset_type = np.int64 if pa.types.is_large_binary(images.type) else np.int32
        offsets = np.frombuffer(ends, offset_type)[images.offset : images.offset + len(images) + 1].astype(np.int64)
        uris = range_uris(file, first + offsets[:-1], np.diff(offsets))
        yield columns, table, uris


def _parquet_rows(file: Location, stream: pa.NativeFile, named: NamedColumns) -> _Blocks:
    """Yield the rows of each row group. Images are read from the first group only, to check that the file holds them."""
    parquet = pq.ParquetFile(stream)
    columns = _choose_columns(file, parquet.schema_arrow, named)
    wanted = [name for name in (columns.label, columns.image_id, columns.group) if name is not None]
    for group in range(parquet.num_row_groups):
        if group == 0:
            first = _flat(parquet.read_row_group(group, columns=[columns.image]))
            _require_bytes(file, columns.image, first[columns.image])
        table = _flat(parquet.read_row_group(group, columns=wanted))
        table.validate(full=True)  # Parquet accepts any bytes as text
        yield columns, table, parquet_uris(file, group, table.num_rows, columns.image)


def _flat(table: pa.Table) -> pa.Table:
    """Turn structs into dotted columns."""
    while any(pa.types.is_struct(field.type) for field in table.schema):
        table = table.flatten()
    return table


def _require_bytes(file: Location, column: str, images: pa.Array) -> None:
    if (row := pc.index(pc.fill_null(pc.binary_length(images), 0), 0).as_py()) >= 0:
        raise UserError(
            f"{file}: row {row} of a batch has no {column}, perhaps only a path;"
            " load the data set and call `save_to_disk`, which stores the bytes"
        )


def _rows(
    file: Location, table: pa.Table, columns: _Columns, uris: pa.Array, label_names: Sequence[str] | None
) -> pa.Table:
    """Return n rows of schema `LABELLED_IMAGES`; `image_id` is null if the file has no ids."""
    column = table[columns.label].combine_chunks()
    if is_list(column.type):
        num_labels = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        flat = column.flatten()
    else:
        num_labels, flat = np.ones(len(column), np.int64), column
    if pa.types.is_integer(flat.type):
        names = columns.label_names or label_names
        if names is None:
            raise UserError(
                f"{file}: {columns.label} holds numbers without names; name them in a text file (data.labels), one per line"
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
            f"{file}: {columns.label} is {column.type}; it must hold a label or a list of labels, as text or whole numbers"
        )
    else:
        flat = pc.utf8_trim_whitespace(flat)
        known = pc.fill_null(pc.not_equal(flat, ""), False)
    rows = np.repeat(np.arange(len(num_labels)), num_labels)[known.to_numpy(zero_copy_only=False)]
    ends = np.cumsum(np.bincount(rows, minlength=len(num_labels)))
    labels = pa.ListArray.from_arrays(pa.array(np.append(0, ends), pa.int32()), flat.filter(known).cast(pa.string()))
    if columns.image_id is None:
        image_ids = pa.nulls(len(labels), pa.string())
    else:
        image_ids = table[columns.image_id].cast(pa.string())
        if (row := pc.index(image_ids.is_null(), True).as_py()) >= 0:
            raise UserError(f"{file}: row {row} of a batch has no {columns.image_id}; fill it in, or remove the column")
    images = pa.table([image_ids, uris, labels], LABELLED_IMAGES)
    return images if columns.group is None else images.append_column("group", _groups(file, table, columns.group))


def _groups(file: Location, table: pa.Table, name: str) -> pa.ChunkedArray:
    """Return the groups of n rows as strings."""
    column = table[name]
    if not (
        pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_integer(column.type)
    ):
        raise UserError(f"{file}: {name} (data.group_column) is {column.type}; it must hold texts or whole numbers")
    texts = pc.utf8_trim_whitespace(column.cast(pa.string()))
    if (row := pc.index(pc.equal(texts.fill_null(""), ""), True).as_py()) >= 0:
        raise UserError(f"{file}: row {row} of a batch has no {name} (data.group_column); fill it in")
    return texts


def _choose_columns(file: Location, schema: pa.Schema, named: NamedColumns) -> _Columns:
    image, label = named.image, named.label
    flat = _flat(schema.empty_table()).schema
    binary = [field.name for field in flat if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)]
    images = [name for name in (image, f"{image}.bytes") if name in binary] if image else binary
    if image is None and len(binary) > 1:
        images = [name for name in binary if name.removesuffix(".bytes") in _IMAGE_FIELDS]
    labels = [name for name in ((label,) if label else LABEL_FIELDS) if name in flat.names]
    for role, candidates, requested in (("image", images, image), ("label", labels, label)):
        if len(candidates) != 1:
            problem = (
                f"no {role} column {requested!r}" if requested else f"{len(candidates)} columns may hold the {role}"
            )
            raise UserError(f"{file}: {problem}; name one of {', '.join(flat.names)} with data.{role}_column")
    if named.group is not None and named.group not in flat.names:
        raise UserError(f"{file}: no column {named.group!r} (data.group_column); name one of {', '.join(flat.names)}")
    image_id = next((name for name in ID_COLUMNS if name in flat.names), None)
    return _Columns(images[0], labels[0], image_id, named.group, _class_names(schema, labels[0]))


def _class_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """Return the names of a column of class numbers, from the features that `datasets` keeps in the schema."""
    try:
        feature: Any = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        for part in column.split("."):
            feature = _element(feature)[part]
        feature = _element(feature)
        return tuple(feature["names"]) if feature.get("_type") == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None  # another program wrote the file: labels are texts, or data.labels names them


def _element(feature: Any) -> Any:
    """Return the feature inside a list feature: [feature], or {"feature": ..., "_type": "Sequence" or "List"}."""
    while isinstance(feature, list) or (
        isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List", "LargeList")
    ):
        feature = feature[0] if isinstance(feature, list) else feature["feature"]
    return feature
