"""Reads a manifest: a table (CSV, TSV, JSON Lines or Parquet) with a row for each image that says where it is and what is on it."""

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
from ..types import SampleTable
from .image_uris import MissingImages, absolute_uris, find_local, missing_notes, require_images
from .label_columns import as_text, encode_lists, label_values, split_lists
from .stratify import SPLIT_WORDS, SPLITS
from .table_files import open_table

IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "file_name", "filename", "file", "uri", "path", "url")
LABEL_COLUMNS = ("labels", "label", "tags")
SPLIT_COLUMNS = ("split", "split_name")
ID_COLUMNS = ("image_id", "id")


class OwnImages(NamedTuple):
    """Images of a data set that publishes no splits of its own.

    Attributes:
        samples: all of them.
        split: [n] int8, position in `SPLITS` of each image's split; None where the data set does not say.
    """

    samples: SampleTable
    split: npt.NDArray[np.int8] | None


@dataclass(frozen=True)
class _Columns:
    """Which column is what; either `listed` names the one that lists the labels, or `labels` those of single labels."""

    image: str
    listed: str | None
    labels: tuple[str, ...]
    split: str | None
    id: str | None

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(name for name in (self.image, self.split, self.id) if name is not None)


def read_manifest(
    place: Location,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    label_separator: str | None = None,
    label_names: Sequence[str] | None = None,
    missing_images: MissingImages = "error",
) -> OwnImages:
    """Reads all rows.

    Args:
        place: the file. Relative paths of images start from its folder and stay below it.
        image_column: where the images are; None: the one that is named as in `IMAGE_COLUMNS`.
        label_column: the column that lists the labels; None: the one that is named as in `LABEL_COLUMNS`, and without
            one, or where each of `label_names` has a column, every column that is not image, split or id is a label.
        label_separator: between labels in a text; None: found, see `split_lists`.
        label_names: all labels in their order; None: those that occur, in alphabetical order. Of label columns it
            names those to use.
        missing_images: whether a local image that is not there is an error or a row to leave out.

    Returns:
        n rows in the order of the file. `image_id` is the column of that name (see `ID_COLUMNS`), else the image as
        written. Targets in {1, 0} for lists, in {1, 0, -1} for label columns.

    Raises:
        UserError: if the file, a column or a row is not as it must be, with the row, counted from 1 after the names of columns.
    """
    file = open_table(place)
    columns = _choose_columns(place, file.names, image_column, label_column, label_names)
    texts: dict[str, list[pa.Array]] = {name: [] for name in columns.texts}
    lists: list[pa.Array] = []
    values: list[npt.NDArray[np.int8]] = []
    num_rows = 0
    for block in file.read([*dict.fromkeys((*columns.texts, *filter(None, [columns.listed]), *columns.labels))]):
        for name in columns.texts:
            texts[name] += as_text(place, name, block[name]).chunks
        if columns.listed is not None:
            lists += block[columns.listed].chunks
        else:
            part = np.empty((block.num_rows, len(columns.labels)), np.int8)
            for position, name in enumerate(columns.labels):
                part[:, position] = label_values(place, name, block[name], num_rows + 1)
            values.append(part)
        num_rows += block.num_rows
    if not num_rows:
        raise UserError(f"{place}: has names of columns but no row; write a row for each image")

    whole = {name: _require_filled(place, name, pa.chunked_array(parts)) for name, parts in texts.items()}
    images = pc.replace_substring(whole[columns.image], "\\", "/")  # as some systems write paths
    image_ids = images if columns.id is None else whole[columns.id]
    _require_unique(place, columns.id or columns.image, image_ids)
    split = None if columns.split is None else _split_codes(place, columns.split, whole[columns.split])
    uris = absolute_uris(place, images)
    if columns.listed is not None:
        found, how = split_lists(place, columns.listed, pa.chunked_array(lists), label_separator)
        names, targets = encode_lists(place, columns.listed, found, label_names)
    else:
        names, targets, how = columns.labels, np.concatenate(values), "a column for each label"

    notes = [f"{place.name}: {num_rows} images, {len(names)} labels ({how})"]
    unused = sorted({*file.names} - {*columns.texts, *columns.labels, columns.listed, ""})
    if unused:
        notes.append(f"{place.name}: columns not used: {', '.join(map(repr, unused))}")
    there = find_local(uris)
    require_images(place, uris, there, missing_images)
    notes += missing_notes(place.name, there)
    samples = SampleTable.from_columns(image_ids, uris, targets, names, place.name, tuple(notes))
    if there.all():
        return OwnImages(samples, split)
    rows = np.flatnonzero(there)
    return OwnImages(samples.take(rows), None if split is None else split[rows])


def _choose_columns(
    place: Location,
    names: Sequence[str],
    image_column: str | None,
    label_column: str | None,
    label_names: Sequence[str] | None,
) -> _Columns:
    there = f"its columns are {', '.join(map(repr, names)) or 'none'}"
    for option, column in (("image", image_column), ("label", label_column)):
        if column is not None and column not in names:
            raise UserError(f"{place}: there is no column {column!r} (data.{option}_column); {there}")

    def usual(option: str, wanted: Sequence[str]) -> str | None:
        found = [name for name in names if name.lower() in wanted and name not in (image_column, label_column)]
        if len(found) > 1:
            raise UserError(
                f"{place}: the {option} may be in {' or '.join(map(repr, found))}; say which (--data.{option}-column NAME)"
            )
        return found[0] if found else None

    image = image_column or usual("image", IMAGE_COLUMNS)
    if image is None:
        raise UserError(
            f"{place}: no column is named as columns of images are ({', '.join(IMAGE_COLUMNS)}), {there};"
            " say which one it is (--data.image-column NAME)"
        )
    # where each of the given labels has a column, one of them may be called as a column of lists is
    own = label_names is not None and {*label_names} <= {*names}
    listed = label_column or (None if own else usual("label", LABEL_COLUMNS))
    split = next((name for name in names if name.lower() in SPLIT_COLUMNS and name not in (image, listed)), None)
    ids = [name for name in names if name.lower() in ID_COLUMNS and name not in (image, listed)]
    labels = [] if listed else sorted({*names} - {image, split, *ids, ""})
    if not listed and label_names is not None:
        absent = [name for name in label_names if name not in labels]
        if absent:
            raise UserError(
                f"{place}: there is neither a column that lists labels ({', '.join(LABEL_COLUMNS)}) nor one for the label"
                f" {absent[0]!r} of data.labels; {there}"
            )
        labels = list(label_names)
    if not listed and not labels:
        raise UserError(
            f"{place}: no column holds labels, {there}; add one named 'labels', or say which one it is"
            " (--data.label-column NAME)"
        )
    return _Columns(
        image, listed, tuple(labels), split, min(ids, key=lambda name: name.lower() != ID_COLUMNS[0], default=None)
    )


def _require_filled(place: Location, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    filled = pc.match_substring_regex(column.fill_null(""), r"^[^\r\n]+$")
    if not pc.all(filled).as_py():
        row = pc.index(filled, False).as_py()
        what = "has a line break in it; is a quote missing?" if column[row].as_py() else "is empty; fill it in"
        raise UserError(f"{place}, row {row + 1}: column {name!r} {what}")
    return column


def _require_unique(place: Location, name: str, column: pa.ChunkedArray) -> None:
    if pc.count_distinct(column).as_py() == len(column):
        return
    counts = pc.value_counts(column)
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    rows = np.flatnonzero(pc.equal(column, twice[0]).to_numpy())
    raise UserError(
        f"{place}: {twice[0].as_py()!r} in column {name!r} is in rows {rows[0] + 1} and {rows[1] + 1}, and {len(twice)} images"
        " are in more than one row; write one row for each image with all its labels"
    )


def _split_codes(place: Location, name: str, column: pa.ChunkedArray) -> npt.NDArray[np.int8]:
    words = pc.utf8_lower(pc.utf8_trim_whitespace(column))
    found = pc.index_in(words, value_set=pa.array(SPLIT_WORDS))
    if found.null_count:
        row = pc.index(pc.is_null(found), True).as_py()
        raise UserError(
            f"{place}, row {row + 1}: {column[row].as_py()!r} in column {name!r} is none of {', '.join(SPLIT_WORDS)}; correct it"
        )
    positions = np.array([SPLITS.index(split) for split in SPLIT_WORDS.values()], np.int8)
    return np.asarray(positions[found.to_numpy()], np.int8)
