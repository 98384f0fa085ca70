"""Reads folders of images named after labels (`dog/`, `cat/`), with or without folders of splits around them (`train/dog/`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..errors import UserError
from ..io.storage import Location
from ..types import PRESENT, SampleTable
from .folder_labels import require_label_folders, same_photographs, split_names
from .image_uris import is_image, list_images, uris_below
from .manifest import CustomImages
from .split_names import SPLIT_WORDS, SPLITS

_LAYOUT = "folders named after labels (dog/, cat/) with images inside, or folders train/, val/, test/ around them"


def read_folders(root: Location, *, label_names: Sequence[str] | None = None) -> CustomImages:
    """Read all images. An image has the label of its folder, also if it lies in a subfolder.

    A folder may combine labels (`car+person/`, see `split_names`). Equal local files in folders of several labels are one image with
    all these labels.

    Args:
        root: the folder that holds the folders of labels, or folders of splits that hold them.
        label_names: all labels in their order; None: the folders' labels, in alphabetical order.

    Returns:
        n rows in the order of splits, labels and paths; `image_id` is the path relative to `root`, targets in {1, 0}.

    Raises:
        UserError: if `root` is missing, has no such folders, or holds a label that is not in `label_names`.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder that holds {_LAYOUT}")
    top_folders = _subfolders(root)
    has_splits = _are_splits(root, top_folders)
    paths = sorted(top_folders)
    if has_splits:
        paths = [f"{top}/{label}" for top in top_folders for label in _subfolders(root / top)]
        paths.sort(key=lambda path: (_split_position(path), path))

    require_label_folders(root, paths)
    stray_notes = _stray_notes(root, top_folders if has_splits else [])
    images, image_notes = list_images(root, paths, recursive=True)
    folder_names = [path.rpartition("/")[2] for path in images]
    labels_of, name_notes = split_names(sorted(set(folder_names)), label_names)
    labels = sorted({label for each in labels_of.values() for label in each})
    if len(labels) < 2:
        raise UserError(f"{root}: {_why_no_labels(root, labels, [] if has_splits else top_folders)}")
    _require_known(root, labels, label_names)
    all_labels = tuple(labels if label_names is None else label_names)
    sizes = [len(ids) for ids in images.values()]
    rows_per_folder = np.zeros((len(folder_names), len(all_labels)), np.int8)
    for row, name in enumerate(folder_names):
        rows_per_folder[row, [all_labels.index(label) for label in labels_of[name]]] = PRESENT
    targets = np.repeat(rows_per_folder, sizes, axis=0)
    split = np.repeat(np.array([_split_position(path) for path in images], np.int8), sizes) if has_splits else None
    ids = pa.chunked_array(list(images.values()))
    uris = uris_below(root, ids)
    form = "one folder per label" if len(labels) == len(labels_of) else "folders of labels"
    summary = f"{root.name}: {len(targets)} images, {len(all_labels)} labels ({form})"
    kept = np.arange(len(targets))
    copy_notes: list[str] = []
    if root.is_local:
        names = np.unique(folder_names, return_inverse=True)[1].astype(np.int64)
        groups = same_photographs(uris.to_pylist(), np.repeat(names, sizes), split)
        kept, copy_notes = _join_copies(root, ids, targets, groups)
    notes = (summary, *name_notes, *copy_notes, *stray_notes, *image_notes)
    samples = SampleTable.from_columns(ids, uris, targets, all_labels, root.name, notes)
    if len(kept) < len(targets):
        return CustomImages(samples.take(kept), None if split is None else split[kept])
    return CustomImages(samples, split)


def _stray_notes(root: Location, split_folders: Sequence[str]) -> list[str]:
    folders = (root, *(root / name for name in split_folders))
    num_stray = sum(is_image(name) for folder in folders for name in folder.names())
    return [f"{root.name}: {num_stray} images left out that are in no label's folder"] if num_stray else []


def _require_known(root: Location, labels: Sequence[str], label_names: Sequence[str] | None) -> None:
    unknown = [label for label in labels if label_names is not None and label not in label_names]
    if unknown:
        raise UserError(
            f"{root}: folder {unknown[0]!r} is not among the labels of data.labels; rename it or add it there"
        )


def _join_copies(
    root: Location, ids: pa.ChunkedArray, targets: npt.NDArray[np.int8], groups: Sequence[Sequence[int]]
) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Give the first image of each group the labels of all; return the rows to keep, and a note."""
    kept = np.ones(len(targets), bool)
    for first, *others in groups:
        targets[first] |= targets[others].max(axis=0)
        kept[others] = False
    if not groups:
        return np.flatnonzero(kept), []
    example = ", ".join(ids[row].as_py() for row in groups[0][:3])
    note = (
        f"{root.name}: {len(groups)} images lie in folders of several labels (equal files, as {example}): each counts once, with"
        f" the labels of all its folders; {np.count_nonzero(~kept)} copies are left out"
    )
    return np.flatnonzero(kept), [note]


def _subfolders(folder: Location) -> list[str]:
    return [name.removesuffix("/") for name in folder.names() if name.endswith("/")]


def _split_position(path: str) -> int:
    """Return the position in `SPLITS` of the split whose folder holds the path."""
    return SPLITS.index(SPLIT_WORDS[path.partition("/")[0].lower()])


def _are_splits(root: Location, top_folders: Sequence[str]) -> bool:
    """Return whether all folders are named after splits; a single folder of that name among others may be a label."""
    splits = [name for name in top_folders if name.lower() in SPLIT_WORDS]
    if len(splits) > 1 and len(splits) < len(top_folders):
        other = next(name for name in top_folders if name not in splits)
        raise UserError(
            f"{root}: holds {', '.join(f'{name}/' for name in splits)} beside {other}/, so it is not clear whether these are"
            " splits or labels; keep only folders of splits or only folders of labels there"
        )
    return bool(splits) and len(splits) == len(top_folders)


def _why_no_labels(root: Location, labels: Sequence[str], top_folders: Sequence[str]) -> str:
    """Return why fewer than two labels were found, with the level of folders that may have been meant."""
    likely = [f"{root / name}" for name in top_folders if len(_subfolders(root / name)) > 1]
    if not likely and any(is_image(name) for name in root.names()) and len(_subfolders(root.parent)) > 1:
        likely = [f"{root.parent}"]  # the folder of one label was given
    suggestion = f" (did you mean {likely[0]}?)" if likely else ""
    what = f"holds one folder of images only ({labels[0]}/)" if labels else "holds no folder of images"
    return f"{what}; give the folder that holds {_LAYOUT}{suggestion}"
