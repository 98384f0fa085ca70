"""Reads a manifest: a table (CSV, TSV, JSON Lines or Parquet) whose rows give the path and the labels of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from ..io.storage import Location
from ..types import PRESENT, UNKNOWN, SampleTable
from .image_lookup import locate_images
from .image_uris import MissingImages, find_local, is_image, missing_notes, require_images
from .label_columns import as_text, encode_lists, is_list, split_lists
from .label_values import USUAL_MEANING, ValueMeaning, resolve_values, value_codes
from .split_columns import SplitColumn, decode_splits, find_split_column
from .table_files import TableFile, open_table

IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "file_name", "filename", "file", "uri", "path", "url")
LABEL_COLUMNS = ("labels", "label", "tags")
_NO_HEADER = ". The first line seems to be an image: it must name the columns, as in image,labels"
UNKNOWN_COLUMN = (
    "unknown"  # lists labels that are neither present nor absent, beside a column that lists the present ones
)
ID_COLUMNS = ("image_id", "id")


class CustomImages(NamedTuple):
    """Images of a data set that publishes no splits.

    Attributes:
        samples: all n images.
        split: [n] int8, position in `SPLITS` of each image's split; None if the data set names no splits.
    """

    samples: SampleTable
    split: npt.NDArray[np.int8] | None


@dataclass(frozen=True)
class NamedColumns:
    """The columns that the settings name: of image paths, of lists of labels, of groups; None: see `read_manifest`."""

    image: str | None = None
    label: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class _Columns:
    """The role of each column. Either `label_list` names the column that lists the labels, or `labels` the columns of single labels."""

    image: str
    label_list: str | None
    labels: tuple[str, ...]
    split: SplitColumn
    id: str | None
    group: str | None

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(name for name in (self.image, self.split.name, self.id, self.group) if name is not None)


def read_manifest(
    manifest: Location,
    *,
    named: NamedColumns = NamedColumns(),
    label_separator: str | None = None,
    label_names: Sequence[str] | None = None,
    missing_images: MissingImages = "error",
    meaning: ValueMeaning = USUAL_MEANING,
) -> CustomImages:
    """Read all rows.

    Args:
        manifest: the file. Relative paths of images start from its folder and stay below it.
        named: image, without it the column with a name of `IMAGE_COLUMNS`; label, the column that lists the labels, without it the
            column with a name of `LABEL_COLUMNS`; group, without it there are no groups. If there is no column of lists, or each of
            `label_names` has a column, every column that is not image, split, id or group is a label.
        label_separator: between labels in a text; None: detected, see `split_lists`.
        label_names: all labels in their order; None: the labels that occur, in alphabetical order. With a column per label, they name
            the columns to use.
        missing_images: whether a missing local image is an error or a row to leave out.
        meaning: what the values of label columns mean.

    Returns:
        n rows in the order of the file. `image_id` is the id column (see `ID_COLUMNS`), else the image path as written. Targets are in
        {1, 0, -1}; without a column `unknown` in {1, 0} for lists.

    Raises:
        UserError: if the file, a column or a row is invalid, with the row, counted from 1 below the header.
    """
    table = open_table(manifest)
    columns = _choose_columns(manifest, table.names, named, label_names)
    texts, labels = _read_cells(manifest, table, columns, meaning)
    images = pc.replace_substring(texts[columns.image], "\\", "/")  # Windows paths
    _require_this_machine(manifest, images)
    image_ids = images if columns.id is None else texts[columns.id]
    _require_unique(manifest, columns.id or columns.image, image_ids)
    split, split_note = None, None
    if columns.split.name is not None:
        split, split_note = decode_splits(manifest, columns.split.name, texts[columns.split.name])
    uris, lookup_notes = locate_images(manifest, images)
    if columns.label_list is not None:
        lists, form = split_lists(manifest, columns.label_list, labels, label_separator)
        names, targets = encode_lists(manifest, columns.label_list, lists, label_names)
        value_notes = _mark_unknown(manifest, table, label_separator, names, targets)
    else:
        targets, value_notes = resolve_values(manifest, columns.labels, labels, meaning)
        names, form = columns.labels, "one column per label"

    notes = [f"{manifest.name}: {len(images)} images, {len(names)} labels ({form})", *value_notes]
    notes += [f"{manifest.name}: {split_note}"] if split_note else []
    notes += _unused_note(manifest, table, columns)
    found = find_local(uris)
    require_images(manifest, uris, found, missing_images)
    notes += [*lookup_notes, *missing_notes(manifest.name, found)]
    samples = SampleTable.from_columns(image_ids, uris, targets, names, manifest.name, tuple(notes))
    if columns.group is not None:
        groups = pc.utf8_trim_whitespace(texts[columns.group])
        samples = samples.with_groups(_require_filled(manifest, columns.group, groups))
    rows = np.flatnonzero(found)
    return CustomImages(samples if found.all() else samples.take(rows), None if split is None else split[rows])


def _require_this_machine(manifest: Location, images: pa.ChunkedArray) -> None:
    if (row := pc.index(pc.match_substring_regex(images, r"^[A-Za-z]:/"), True).as_py()) >= 0:
        raise UserError(
            f"{manifest}, row {row + 1}: {images[row].as_py()!r} is an absolute Windows path of another machine; write the paths relative"
            f" to {manifest.parent}"
        )


def _mark_unknown(
    manifest: Location, table: TableFile, separator: str | None, names: tuple[str, ...], targets: npt.NDArray[np.int8]
) -> list[str]:
    """Set the labels that the column `unknown` lists to unknown, in place; return a note on their number.

    Args:
        manifest, table: the file.
        separator: between labels in a text; None: the cells are JSON lists, or have ; between labels.
        names: the C labels.
        targets: [n, C] int8.
    """
    if UNKNOWN_COLUMN not in table.names:
        return []
    cells = pa.chunked_array(
        [chunk for block in table.read([UNKNOWN_COLUMN]) for chunk in block[UNKNOWN_COLUMN].chunks]
    )
    if not is_list(cells.type):
        texts = as_text(manifest, UNKNOWN_COLUMN, cells).fill_null("")
        separator = separator or (None if pc.any(pc.match_substring_regex(texts, r"^\s*\[")).as_py() else ";")
        if not pc.any(pc.match_substring_regex(texts, r"[^\s\[\]]")).as_py():
            return []
    lists, _ = split_lists(manifest, UNKNOWN_COLUMN, cells, separator)
    _, listed = encode_lists(manifest, UNKNOWN_COLUMN, lists, names)
    row = int(np.argmax(both)) if (both := ((targets == PRESENT) & (listed == PRESENT)).any(1)).any() else None
    if row is not None:
        raise UserError(
            f"{manifest}, row {row + 1}: a label is both present and in {UNKNOWN_COLUMN!r}; remove it from one of them"
        )
    targets[listed == PRESENT] = UNKNOWN
    return [f"{manifest.name}: {int(listed.sum())} labels are unknown (column {UNKNOWN_COLUMN!r})"]


def _unused_note(manifest: Location, table: TableFile, columns: _Columns) -> list[str]:
    read = {*columns.texts, *columns.labels, columns.label_list, ""} | (
        {UNKNOWN_COLUMN} if columns.label_list else set()
    )
    unused = sorted({*table.names} - read)
    return [f"{manifest.name}: columns not used: {', '.join(map(repr, unused))}"] if unused else []


def _read_cells(
    manifest: Location, table: TableFile, columns: _Columns, meaning: ValueMeaning
) -> tuple[dict[str, pa.ChunkedArray], pa.ChunkedArray | npt.NDArray[np.int8]]:
    """Read and check the columns, block by block.

    Returns:
        The texts by column, [n] string, and the labels: [n] lists as in the file, or [n, C] int8 codes of label columns.
    """
    texts: dict[str, list[pa.Array]] = {name: [] for name in columns.texts}
    lists: list[pa.Array] = []
    values: list[npt.NDArray[np.int8]] = []
    num_rows = 0
    for block in table.read([*dict.fromkeys((*columns.texts, *filter(None, [columns.label_list]), *columns.labels))]):
        for name in columns.texts:
            column = block[name]
            if name == columns.split.name and not pa.types.is_nested(column.type):
                column = column.cast(pa.string())  # also flags and floats
            texts[name] += as_text(manifest, name, column).chunks
        if columns.label_list is not None:
            lists += block[columns.label_list].chunks
        else:
            part = np.empty((block.num_rows, len(columns.labels)), np.int8)
            for position, name in enumerate(columns.labels):
                part[:, position] = value_codes(manifest, name, block[name], num_rows + 1, meaning)
            values.append(part)
        num_rows += block.num_rows
    if not num_rows:
        raise UserError(f"{manifest}: has a header but no row; write one row per image")
    whole = {name: _require_filled(manifest, name, pa.chunked_array(parts)) for name, parts in texts.items()}
    return whole, np.concatenate(values) if columns.label_list is None else pa.chunked_array(lists)


def _choose_columns(
    manifest: Location,
    names: Sequence[str],
    named: NamedColumns,
    label_names: Sequence[str] | None,
) -> _Columns:
    image_column, label_column = named.image, named.label
    header = f"its columns are {', '.join(map(repr, names)) or 'none'}"
    for option, column in (("image", image_column), ("label", label_column), ("group", named.group)):
        if column is not None and column not in names:
            raise UserError(
                f"{manifest}: there is no column {column!r} (data.{option}_column); {header}; name one of them"
            )

    def find_usual(option: str, usual: Sequence[str]) -> str | None:
        found = [
            name for name in names if name.lower() in usual and name not in (image_column, label_column, named.group)
        ]
        if len(found) > 1:
            raise UserError(
                f"{manifest}: the {option} may be in {' or '.join(map(repr, found))}; choose one (--data.{option}-column NAME)"
            )
        return found[0] if found else None

    image = image_column or find_usual("image", IMAGE_COLUMNS)
    if image is None:
        raise UserError(
            f"{manifest}: no column has a usual name of an image column ({', '.join(IMAGE_COLUMNS)}), {header};"
            " name it with --data.image-column NAME" + (_NO_HEADER if any(map(is_image, names)) else "")
        )
    # if each of the given labels has a column, one of these labels may have the usual name of a column of lists
    has_label_columns = label_names is not None and {*label_names} <= {*names}
    label_list = label_column or (None if has_label_columns else find_usual("label", LABEL_COLUMNS))
    split = find_split_column(names, (image, label_list, named.group, *(label_names or ())))
    ids = [name for name in names if name.lower() in ID_COLUMNS and name not in (image, label_list)]
    labels = [] if label_list else sorted({*names} - {image, split.name, *split.others, *ids, named.group, ""})
    if not label_list and label_names is not None:
        absent = [name for name in label_names if name not in labels]
        if absent:
            raise UserError(
                f"{manifest}: there is neither a column that lists labels ({', '.join(LABEL_COLUMNS)}) nor one for the label"
                f" {absent[0]!r} of data.labels; {header}"
            )
        labels = list(label_names)
    if not label_list and not labels:
        raise UserError(
            f"{manifest}: no column holds labels, {header}; add one named 'labels', or name it with --data.label-column NAME"
        )
    preferred_id = min(ids, key=lambda name: name.lower() != ID_COLUMNS[0], default=None)
    return _Columns(image, label_list, tuple(labels), split, preferred_id, named.group)


def _require_filled(manifest: Location, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    row = pc.index(pc.match_substring_regex(column.fill_null(""), r"^[^\r\n]+$"), False).as_py()
    if row >= 0:
        what = "has a line break in it; is a quote missing?" if column[row].as_py() else "is empty; fill it in"
        raise UserError(f"{manifest}, row {row + 1}: column {name!r} {what}")
    return column


def _require_unique(manifest: Location, name: str, column: pa.ChunkedArray) -> None:
    if pc.count_distinct(column).as_py() == len(column):
        return
    counts = pc.value_counts(column)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    rows = np.flatnonzero(pc.equal(column, repeated[0]).to_numpy())
    raise UserError(
        f"{manifest}: {repeated[0].as_py()!r} in column {name!r} is in rows {rows[0] + 1} and {rows[1] + 1}"
        f" (images in several rows: {len(repeated)}); write one row per image with all its labels"
    )
