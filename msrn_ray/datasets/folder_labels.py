"""Finds the labels that folders stand for: combined names (`car+person/`), copies of a photograph in several folders, other layouts."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..io.storage import Location
from .text_files import first_few

SEPARATORS = ("+", "&", ",", ";")
_IMAGE_FOLDERS = {"images", "image", "imgs", "img", "jpegimages"}
_ANNOTATION_FOLDERS = {
    *("masks", "mask", "annotations", "annotation", "labels", "segmentation", "segmentations", "groundtruth"),
    *("ground_truth", "gt", "segmentationclass", "segmentationobject"),
}
_HEAD_BYTES = 65_536  # most files of equal size already differ here


def split_names(folders: Sequence[str], label_names: Sequence[str] | None) -> tuple[dict[str, list[str]], list[str]]:
    """Return the labels of each folder name, and notes on combined names.

    A part is known if it is in `label_names`, or, without these, in the names of several folders. If all parts of at least half of the
    names with a separator are known, all these names are split; with `label_names`, only those whose parts are known.

    Args:
        folders: the different names.
        label_names: all labels; None: unknown.
    """
    labels = {name: [name] for name in folders}
    notes = []
    for separator in SEPARATORS:
        combined = [name for name in folders if separator in name and name not in (label_names or ())]
        if not combined:
            continue
        parts = {name: [part.strip() for part in name.split(separator)] for name in folders}
        counts = Counter(part for each in parts.values() for part in set(each))
        known = set(label_names) if label_names is not None else {part for part, count in counts.items() if count > 1}
        divided = [name for name in combined if all(part in known for part in parts[name])]
        if label_names is None and 2 * len(divided) >= len(combined):
            divided = [name for name in combined if all(parts[name])]
        elif label_names is None:
            divided = []
        labels |= {name: list(dict.fromkeys(parts[name])) for name in divided}
        kept = [name for name in combined if name not in divided]
        if divided:
            notes.append(
                f"{len(divided)} folders have several labels, separated by {separator!r} ({first_few(divided)})"
            )
        if kept:
            notes.append(
                f"{len(kept)} folders with {separator!r} in the name are one label each, since other folders lack their parts"
                f" ({first_few(kept)})"
            )
    return labels, notes


def require_label_folders(root: Location, paths: Sequence[str]) -> None:
    """Refuse folders that are parts of another layout: `images/` beside `masks/` or `labels/`.

    Raises:
        UserError: with the folders, and what to do.
    """
    names = {path.rpartition("/")[2].lower(): path for path in paths}
    images = next((names[name] for name in names if name in _IMAGE_FOLDERS), None)
    other = next((names[name] for name in names if name in _ANNOTATION_FOLDERS), None)
    if images is None or other is None:
        return
    yolo = [name for name in root.names() if name.lower().endswith((".yaml", ".yml"))]
    if yolo:
        raise UserError(
            f"{root}: {yolo[0]}, {images}/ and {other}/ are a YOLO data set, not one folder per label; write a manifest with a line"
            " per image and the names of its classes (image,labels)"
        )
    raise UserError(
        f"{root}: {images}/ beside {other}/ holds images and their annotations, not one folder per label; move the images into"
        " folders named after labels, or write a manifest (image,labels)"
    )


def same_photographs(
    uris: Sequence[str], labels: npt.NDArray[np.int64], splits: npt.NDArray[np.int8] | None
) -> list[list[int]]:
    """Return the groups of rows, each in order, whose files have equal bytes but lie in folders of different labels of a split.

    Args:
        uris: [n] local paths.
        labels: [n] position of each image's folder name.
        splits: [n] position of each image's split; None: no splits.
    """
    sizes = np.array([_size(uri) for uri in uris], np.int64)
    found = []
    for rows in _groups([(size, 0 if splits is None else int(splits[row])) for row, size in enumerate(sizes.tolist())]):
        if sizes[rows[0]] <= 0 or len({*labels[rows].tolist()}) < 2:
            continue
        for limit in (_HEAD_BYTES, None):
            rows_by_digest = _groups([_digest(uris[row], limit) for row in rows])
            candidates = [[rows[at] for at in group] for group in rows_by_digest]
            rows = [row for group in candidates if len({*labels[group].tolist()}) > 1 for row in group]
        found += [group for group in candidates if len({*labels[group].tolist()}) > 1]
    return sorted(found)


def _groups(keys: Sequence[object]) -> list[list[int]]:
    """Return the positions of each key that occurs more than once."""
    groups: dict[object, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    return [group for group in groups.values() if len(group) > 1]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1  # the file is reported where it is decoded


def _digest(path: str, limit: int | None) -> object:
    try:
        with open(path, "rb") as file:
            if limit is not None:
                return hashlib.sha256(file.read(limit)).digest()
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return path
