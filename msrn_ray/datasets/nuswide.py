"""Reads the official release of NUS-WIDE: lists of images and, per concept, a file of 0 and 1; images in `Flickr/`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..types import SampleTable
from .coco import require_images

# The order of the authors' release and so of their checkpoints; the official list is alphabetical.
NUSWIDE_LABELS = (
    *("clouds", "sky", "person", "street", "window", "tattoo", "wedding", "animal", "cat", "buildings", "tree"),
    *("airport", "plane", "water", "grass", "cars", "road", "snow", "sunset", "railroad", "train", "flowers"),
    *("plants", "house", "military", "horses", "nighttime", "lake", "rocks", "waterfall", "sun", "vehicle"),
    *("sports", "reflection", "temple", "statue", "ocean", "town", "beach", "tower", "toy", "book", "bridge"),
    *("fire", "mountain", "rainbow", "garden", "police", "coral", "fox", "sign", "dog", "cityscape", "sand"),
    *("dancing", "leaf", "tiger", "moon", "birds", "food", "cow", "valley", "fish", "harbor", "bear", "castle"),
    *("boats", "running", "glacier", "swimmers", "elk", "frost", "protest", "soccer", "flags", "zebra", "surf"),
    *("whales", "computer", "earthquake", "map"),
)
SPLITS = ("Train", "Test")


def read_nuswide(root: Path, split: str, *, keep_unlabelled: bool = True) -> SampleTable:
    """Reads one official split.

    Args:
        root: the folder that holds `ImageList/`, `Groundtruth/`, `Concepts81.txt` and `Flickr/`.
        split: "Train" or "Test".
        keep_unlabelled: whether images without a label stay in, as rows of zeros.

    Returns:
        n rows in the order of the list, targets in {1, 0}; `image_id` is the path in `Flickr/`. Labels are in the order
        of `NUSWIDE_LABELS` if `Concepts81.txt` holds just these, else in the order of that file.

    Raises:
        UserError: if a file is missing or damaged, the files do not fit together, or images are not on disk.
    """
    if split not in SPLITS:
        raise UserError(f"NUS-WIDE has no split {split!r}; choose from: {', '.join(SPLITS)}")
    listing = root / "ImageList" / f"{split}Imagelist.txt"
    concepts = [line.strip() for line in _read(root / "Concepts81.txt").decode(errors="replace").splitlines()]
    concepts = [concept for concept in concepts if concept]
    if not concepts or len(set(concepts)) < len(concepts):
        what = "names a concept twice" if concepts else "is empty"
        raise UserError(f"{root / 'Concepts81.txt'}: {what}; write one concept a line")
    label_names = NUSWIDE_LABELS if set(concepts) == set(NUSWIDE_LABELS) else tuple(concepts)

    lines = _read(listing).decode(errors="replace").splitlines()
    image_ids = [line.strip().replace("\\", "/") for line in lines if line.strip()]
    if not image_ids or len(set(image_ids)) < len(image_ids):
        raise UserError(f"{listing}: {'lists an image twice' if image_ids else 'is empty'}; download it again")
    targets = np.empty((len(image_ids), len(label_names)), np.int8)
    for column, label in enumerate(label_names):
        path = root / "Groundtruth" / "TrainTestLabels" / f"Labels_{label}_{split}.txt"
        targets[:, column] = _read_labels(path, len(image_ids), listing)
    require_images(root / "Flickr", image_ids, listing)

    labelled = targets.any(1)
    verb = "kept" if keep_unlabelled else "dropped"
    note = f"{split}: {len(image_ids)} images, {np.count_nonzero(~labelled)} without a label {verb}"
    base = os.path.abspath(root / "Flickr")
    uris = [os.path.join(base, image_id) for image_id in image_ids]
    samples = SampleTable.from_columns(image_ids, uris, targets, label_names, listing.name, (note,))
    return samples if keep_unlabelled else samples.take(np.flatnonzero(labelled))


def _read(path: Path) -> bytes:
    if not path.is_file():
        needed = "ImageList/, Groundtruth/TrainTestLabels/, Concepts81.txt and Flickr/"
        raise UserError(f"{path}: no such file; give the folder that holds {needed}")
    return path.read_bytes()


def _read_labels(path: Path, num_images: int, listing: Path) -> npt.NDArray[np.int8]:
    """[n] int8 in {1, 0}: one figure a line, in the order of the list of images."""
    figures = _read(path).split()
    if len(figures) != num_images:
        raise UserError(
            f"{path}: {len(figures)} labels for the {num_images} images of {listing.name}; they must pair up"
        )
    if not set(figures) <= {b"0", b"1"}:
        row = next(row for row, figure in enumerate(figures) if figure not in (b"0", b"1"))
        raise UserError(
            f"{path}, line {row + 1}: {figures[row].decode(errors='replace')!r} is not 0 or 1; correct the line"
        )
    return (np.frombuffer(b"".join(figures), np.int8) - ord("0")).astype(np.int8)
