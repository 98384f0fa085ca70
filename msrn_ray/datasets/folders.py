"""Reads folders of images, one a label (`dog/`, `cat/`), with or without folders of splits around them (`train/dog/`, `val/dog/`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ..errors import UserError
from ..io.storage import Location
from ..types import PRESENT, SampleTable
from .image_uris import IMAGE_SUFFIXES, is_image, uris_below
from .manifest import OwnImages
from .stratify import SPLIT_WORDS, SPLITS
from .text_files import require_utf8

_LAYOUT = "folders named as the labels (dog/, cat/) with images inside, or folders train/, val/, test/ around such"


def read_folders(root: Location, *, label_names: Sequence[str] | None = None) -> OwnImages:
    """Reads all images; each has the one label that its folder is named as. Images of folders further in have it too.

    Args:
        root: the folder of the labels' folders, or of splits with the labels' folders inside.
        label_names: all labels in their order; None: those of the folders, in alphabetical order.

    Returns:
        n rows in the order of splits, labels and paths; `image_id` is the path relative to `root`, targets in {1, 0}.

    Raises:
        UserError: if `root` is missing, has no such folders, or holds a label that is not in `label_names`.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder that holds {_LAYOUT}")
    tops = _folders(root)
    splits = [top for top in tops if top.lower() in SPLIT_WORDS]
    if len(splits) > 1 and len(splits) < len(tops):
        others = [top for top in tops if top not in splits]
        raise UserError(
            f"{root}: holds {', '.join(f'{one}/' for one in splits)} beside {others[0]}/, so it is not clear whether these are"
            " splits or labels; have only the one kind there"
        )
    are_splits = bool(splits) and len(splits) == len(tops)
    labelled = (
        [
            (SPLITS.index(SPLIT_WORDS[top.lower()]), f"{top}/{label}", label)
            for top in splits
            for label in _folders(root / top)
        ]
        if are_splits
        else [(0, top, top) for top in tops]
    )

    image_ids: list[pa.Array] = []
    found: list[tuple[int, str, int]] = []
    notes: list[str] = []
    around = [root, *(root / top for top in tops if are_splits)]
    num_stray = sum(is_image(name) for folder in around for name in folder.names())
    if num_stray:
        notes.append(f"{root.name}: {num_stray} images left out that are in no label's folder")
    num_other = 0
    for split, folder, label in sorted(labelled):
        names = [name for name in (root / folder).names(recursive=True) if not name.endswith("/")]
        images = [name for name in names if is_image(name)]
        num_other += len(names) - len(images)
        if images:
            require_utf8(root, (f"{folder}/{name}" for name in images))
            image_ids.append(pa.array([f"{folder}/{name}" for name in images]))
            found.append((split, label, len(images)))
        else:
            notes.append(f"{folder}: no image in this folder")
    labels = sorted({label for _, label, _ in found})
    if len(labels) < 2:
        inside = [f"{root / top}" for top in tops if not are_splits and len(_folders(root / top)) > 1]
        if not inside and any(is_image(name) for name in root.names()) and len(_folders(root.parent)) > 1:
            inside = [f"{root.parent}"]  # one label's folder was given
        hint = f" (did you mean {inside[0]}?)" if inside else ""
        what = f"holds one folder of images only ({labels[0]}/)" if labels else "holds no folder of images"
        raise UserError(f"{root}: {what}; give the folder that holds {_LAYOUT}{hint}")
    unknown = [label for label in labels if label_names is not None and label not in label_names]
    if unknown:
        raise UserError(
            f"{root}: folder {unknown[0]!r} is not among the labels of data.labels; rename it or add it there"
        )
    if num_other:
        notes.append(f"{root.name}: {num_other} files skipped that are not images ({', '.join(IMAGE_SUFFIXES)})")

    all_labels = tuple(labels if label_names is None else label_names)
    sizes = [size for _, _, size in found]
    targets = np.zeros((sum(sizes), len(all_labels)), np.int8)
    targets[np.arange(len(targets)), np.repeat([all_labels.index(label) for _, label, _ in found], sizes)] = PRESENT
    ids = pa.chunked_array(image_ids)
    notes = [f"{root.name}: {len(targets)} images, {len(all_labels)} labels (a folder for each)", *notes]
    samples = SampleTable.from_columns(ids, uris_below(root, ids), targets, all_labels, root.name, tuple(notes))
    return OwnImages(
        samples, np.repeat(np.array([split for split, _, _ in found], np.int8), sizes) if are_splits else None
    )


def _folders(root: Location) -> list[str]:
    return [name.removesuffix("/") for name in root.names() if name.endswith("/")]
