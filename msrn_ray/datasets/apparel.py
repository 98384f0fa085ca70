"""Reads the Apparel layout: a folder of images per combination of labels, `black_dress/`, `blue_shirt/`, ..."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..types import PRESENT, SampleTable

# The order of the authors' release: colours, then garments.
APPAREL_LABELS = ("black", "blue", "brown", "green", "red", "white", "dress", "pants", "shirt", "shoes", "shorts")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def read_apparel(root: Path) -> SampleTable:
    """Reads all images; the name of an image's folder, split at "_", gives its labels.

    Args:
        root: the folder that holds the folders of images.

    Returns:
        n rows in the order of `image_id`, the path relative to `root`; targets in {1, 0}. Labels are the 11 of
        `APPAREL_LABELS` if the folders use no other, else those of the folders in alphabetical order. The layout has
        no splits.

    Raises:
        UserError: if `root` is missing, has no folder named `<label>_<label>`, or these hold no image.
    """
    layout = "folders named <label>_<label>, such as black_dress/, with images inside"
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder that holds {layout}")
    folders = {folder.name: labels for folder in sorted(root.iterdir()) if (labels := _labels(folder))}
    near = next((inner for inner in sorted(root.iterdir()) if _has_label_folders(inner)), None)
    hint = f" (did you mean {near}?)" if near else ""
    if not folders:
        raise UserError(f"{root}: holds no {layout}; give the folder that does{hint}")

    used = {label for labels in folders.values() for label in labels}
    label_names = APPAREL_LABELS if used <= set(APPAREL_LABELS) else tuple(sorted(used))
    notes: list[str] = []
    image_ids: list[str] = []
    num_other = 0
    for folder in folders:
        with os.scandir(root / folder) as entries:
            files = [entry.name for entry in entries if entry.is_file()]
        images = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
        image_ids += [f"{folder}/{name}" for name in images]
        num_other += len(files) - len(images)
        if not images:
            notes.append(f"{folder}: no image in this folder")
    if not image_ids:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise UserError(f"{root}: no image in its {len(folders)} folders; add files with {suffixes}{hint}")
    if num_other:
        notes.append(f"{root.name}: {num_other} files skipped that are not images ({', '.join(IMAGE_SUFFIXES)})")

    ignored = sorted(
        one.name for one in root.iterdir() if one.is_dir() and one.name not in folders and not one.name.startswith(".")
    )
    if ignored:
        notes.append(f"{root.name}: folders not named <label>_<label> are left out: {', '.join(ignored)}")

    image_ids.sort()
    targets = np.zeros((len(image_ids), len(label_names)), np.int8)
    for row, image_id in enumerate(image_ids):
        targets[row, [label_names.index(label) for label in folders[image_id.split("/")[0]]]] = PRESENT
    base = os.path.abspath(root)
    uris = [os.path.join(base, image_id) for image_id in image_ids]
    return SampleTable.from_columns(image_ids, uris, targets, label_names, root.name, tuple(notes))


def _labels(folder: Path) -> tuple[str, ...]:
    """The labels in a folder's name; () if it is no folder of images, as `.ipynb_checkpoints` or `train`."""
    labels = tuple(folder.name.split("_"))
    named_so = len(labels) > 1 and all(labels) and not folder.name.startswith(".")
    return labels if named_so and folder.is_dir() else ()


def _has_label_folders(folder: Path) -> bool:
    return folder.is_dir() and any(_labels(inner) for inner in folder.iterdir())
