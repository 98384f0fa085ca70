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
from .huggingface_labels import LabelBlock, flag_columns, join_flag_columns, name_labels, with_groups
from .imagefolder import find_metadata, read_imagefolder
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
    label: str | None  # None: `flags` name a column per label
    flags: tuple[str, ...]
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
    label_separator: str | None = None,
) -> dict[SplitName, SampleTable]:
    """Read all splits of a folder.

    Args:
        root: what `save_to_disk` wrote (a data set or a dictionary of splits), or a folder of Parquet files whose names or folders begin
            with train, val (valid, validation, dev) or test, or such folders of images with a `metadata.jsonl` or `metadata.csv`.
        label_names: labels in the requested order; None: the order of the features, else all that occur, in alphabetical order.
        image_column: a column of encoded images; None: the only column of this kind.
        label_column: a column with a label or a list of labels per row, as names or as numbers of the features' names. Nested columns are
            dotted (`objects.category`). None: one of `LABEL_FIELDS`; if there is none, each column of type bool is a label.
        group_column: a column of groups, texts or whole numbers; None: the images have no groups.
        label_separator: between labels in a text; None: the only usual one that occurs.

    Returns:
        split -> n rows in the order of the files; image_id is the column `image_id` or `id`, else `<split>/<number of the row>`; targets
        in {1, 0}.

    Raises:
        UserError: if this is no such folder, a file is damaged, or columns are missing or ambiguous.
    """
    metadata = [] if any((root / name).is_file() for name in _SAVED) else find_metadata(root)
    if metadata:
        return read_imagefolder(
            root,
            metadata,
            NamedColumns(image_column, label_column, group_column),
            label_names=label_names,
            label_separator=label_separator,
        )
    parts: dict[SplitName, list[pa.Table]] = {}
    blocks: list[LabelBlock] = []
    orders: set[tuple[str, ...] | None] = set()
    label = ""
    wanted = _Wanted(image_column, label_column, group_column, label_names)
    for split, files in _files_by_split(root).items():
        rows = parts.setdefault(split, [])
        for file in files:
            for columns, cells, uris in _read_file(file, wanted):
                label = columns.label or "labels"
                orders.add(columns.label_names)
                images = pa.table([_ids(file, cells, columns), uris], ["image_id", "uri"])
                rows.append(with_groups(file, images, cells, columns.group))
                blocks.append(_label_block(file, cells, columns, label_names))
        if not rows:
            raise UserError(f"{root}: the {split} split holds no image")
    if label_names is None and len(orders) == 1:
        (label_names,) = orders
    labels, notes = name_labels(root, label, blocks, label_separator)
    return build_tables(_join(parts, labels), label_names, root, notes)


def _join(parts: dict[SplitName, list[pa.Table]], labels: Sequence[pa.Array]) -> dict[SplitName, pa.Table]:
    """Return the images of each split, with the labels of all blocks, in their order, and with ids."""
    named = iter(labels)
    tables = {}
    for split, rows in parts.items():
        labelled = [table.add_column(2, LABELLED_IMAGES.field("labels"), next(named)) for table in rows]
        tables[split] = _with_ids(split, pa.concat_tables(labelled))
    return tables


class _Wanted(NamedTuple):
    """The requested columns and labels."""

    image: str | None
    label: str | None
    group: str | None
    label_names: tuple[str, ...] | None


def _read_file(file: Location, wanted: _Wanted) -> _Blocks:
    try:
        # A memory map leaves the images on disk: only their position in the file is needed.
        with pa.memory_map(file.text) if file.is_local else file.opened_input() as stream:
            yield from (_parquet_rows if file.name.endswith(".parquet") else _arrow_rows)(file, stream, wanted)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: cannot be read ({reason}); download or write it again") from None


def _label_block(file: Location, cells: pa.Table, columns: _Columns, label_names: tuple[str, ...] | None) -> LabelBlock:
    if columns.label is None:
        return LabelBlock(file, join_flag_columns(file, cells, columns.flags), None)
    # A view would keep the images of a remote file in memory, so copy.
    copy = cells[columns.label].combine_chunks().take(pa.array(np.arange(cells.num_rows)))
    return LabelBlock(file, copy, columns.label_names or label_names)


def _ids(file: Location, table: pa.Table, columns: _Columns) -> pa.Array:
    """Return [n] string, null if the file has no ids."""
    if columns.image_id is None:
        return pa.nulls(table.num_rows, pa.string())
    image_ids = table[columns.image_id].cast(pa.string())
    if (row := pc.index(image_ids.is_null(), True).as_py()) >= 0:
        raise UserError(f"{file}: row {row} of a batch has no {columns.image_id}; fill it in, or remove the column")
    return image_ids


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


def _arrow_rows(file: Location, stream: pa.NativeFile, wanted: _Wanted) -> _Blocks:
    """Yield the rows of each record batch. Reading message by message gives the position of a batch in the file."""
    stream.seek(stream.size() - len(_END_OF_STREAM))
    if stream.read() != _END_OF_STREAM:
        raise UserError(f"{file}: cut off; download or write it again")
    stream.seek(0)
    messages = pa.ipc.MessageReader.open_stream(stream)
    schema = pa.ipc.read_schema(messages.read_next_message())
    columns = _choose_columns(file, schema, wanted)
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


def _parquet_rows(file: Location, stream: pa.NativeFile, wanted: _Wanted) -> _Blocks:
    """Yield the rows of each row group. Images are read from the first group only, to check that the file holds them."""
    parquet = pq.ParquetFile(stream)
    columns = _choose_columns(file, parquet.schema_arrow, wanted)
    needed = [name for name in (columns.label, *columns.flags, columns.image_id, columns.group) if name is not None]
    for group in range(parquet.num_row_groups):
        if group == 0:
            first = _flat(parquet.read_row_group(group, columns=[columns.image]))
            _require_bytes(file, columns.image, first[columns.image])
        table = _flat(parquet.read_row_group(group, columns=needed))
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


def _choose_columns(file: Location, schema: pa.Schema, wanted: _Wanted) -> _Columns:
    image, label = wanted.image, wanted.label
    flat = _flat(schema.empty_table()).schema
    binary = [field.name for field in flat if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)]
    images = [name for name in (image, f"{image}.bytes") if name in binary] if image else binary
    if image is None and len(binary) > 1:
        images = [name for name in binary if name.removesuffix(".bytes") in _IMAGE_FIELDS]
    labels = [name for name in ((label,) if label else LABEL_FIELDS) if name in flat.names]
    flags = () if labels or label else flag_columns(file, flat, wanted.label_names)
    for role, candidates, requested in (("image", images, image), ("label", ["flags"] if flags else labels, label)):
        if len(candidates) != 1:
            problem = (
                f"no {role} column {requested!r}" if requested else f"{len(candidates)} columns may hold the {role}"
            )
            raise UserError(f"{file}: {problem}; name one of {', '.join(flat.names)} with data.{role}_column")
    if wanted.group is not None and wanted.group not in flat.names:
        raise UserError(f"{file}: no column {wanted.group!r} (data.group_column); name one of {', '.join(flat.names)}")
    image_id = next((name for name in ID_COLUMNS if name in flat.names), None)
    if flags:
        return _Columns(images[0], None, flags, image_id, wanted.group, flags)
    return _Columns(images[0], labels[0], (), image_id, wanted.group, _class_names(schema, labels[0]))


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
