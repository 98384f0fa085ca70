"""Reads the Apparel layout: a folder of images per combination of labels, `black_dress/`, `blue_shirt/`, ..."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from ..errors import UserError
from ..io.storage import Location
from ..types import ABSENT, PRESENT, SampleTable
from .image_uris import IMAGE_SUFFIXES, is_image, list_images, uris_below
from .text_files import suggest_folder

# The order of the authors' release: colours, then garments.
APPAREL_LABELS = ("black", "blue", "brown", "green", "red", "white", "dress", "pants", "shirt", "shoes", "shorts")


def read_apparel(root: Location, *, single_labels: bool = False) -> SampleTable:
    """Read all images. The name of an image's folder, split at "_", gives its labels.

    Args:
        root: the folder that holds the folders of images.
        single_labels: whether a name without "_" is a label too. Then every folder counts, also `train/` and `backup/`.

    Returns:
        n rows in the order of `image_id`, the path relative to `root`; targets in {1, 0}. Labels are the 11 of `APPAREL_LABELS` if the
        folders use no other, else those of the folders in alphabetical order. The layout has no splits.

    Raises:
        UserError: if `root` is missing, has no folder named after labels, or these folders hold no image.
    """
    pattern = "<label>" if single_labels else "<label>_<label>"
    layout = f"folders named {pattern}, such as {'dress' if single_labels else 'black_dress'}/, with images inside"
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder that holds {layout}")
    subfolders = [name.rstrip("/") for name in root.names() if name.endswith("/")]
    folders = {name: labels for name in subfolders if (labels := _labels(name, single_labels))}
    if not folders:
        raise UserError(
            f"{root}: holds no {layout}; give the folder that holds them{suggest_folder(root, _holds_images)}"
        )

    used = {label for labels in folders.values() for label in labels}
    label_names = APPAREL_LABELS if used <= set(APPAREL_LABELS) else tuple(sorted(used))
    images, notes = list_images(root, folders)
    if not images:
        raise UserError(
            f"{root}: no image in its {len(folders)} folders; add files with {', '.join(IMAGE_SUFFIXES)}"
            f"{suggest_folder(root, _holds_images)}"
        )
    ignored = [name for name in subfolders if name not in folders]
    if ignored:
        notes.append(f"{root.name}: folders not named {pattern} are left out: {', '.join(ignored)}")

    patterns = [[PRESENT if name in folders[folder] else ABSENT for name in label_names] for folder in images]
    targets = np.repeat(np.array(patterns, np.int8), [len(ids) for ids in images.values()], axis=0)
    ids = pa.chunked_array(list(images.values()))
    return SampleTable.from_columns(ids, uris_below(root, ids), targets, label_names, root.name, tuple(notes))


def _labels(folder: str, single_labels: bool) -> tuple[str, ...]:
    """Return the labels in a folder's name; () if the name has none, such as `__pycache__` or `train`."""
    labels = tuple(folder.split("_"))
    return labels if all(labels) and (single_labels or len(labels) > 1) else ()


def _holds_images(root: Location) -> bool:
    """Return whether a folder of `root` named after labels holds an image. The name alone proves nothing: many contain "_"."""
    label_folders = (
        root / name for name in root.names() if name.endswith("/") and _labels(name.rstrip("/"), single_labels=False)
    )
    return any(is_image(name) for folder in label_folders for name in folder.names())
