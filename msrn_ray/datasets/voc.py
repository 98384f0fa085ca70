"""Reads PASCAL VOC2007: in `ImageSets/Main/<class>_<split>.txt` 1 is present, -1 absent, 0 only difficult objects."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import UserError
from ..types import ABSENT, PRESENT, UNKNOWN, SampleTable
from .coco import require_images

VOC_LABELS = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def read_voc(root: Path, split: str, *, difficult: Literal["ignore", "positive", "negative"] = "ignore") -> SampleTable:
    """Reads one split of the 20 classes.

    Args:
        root: `VOC2007`, the `VOCdevkit` around it, or the folder that holds `VOCdevkit`.
        split: "train", "val", "trainval" or "test".
        difficult: what a class is that an image shows only in objects marked difficult: unknown (-1; the official
            evaluation leaves these out), present or absent.

    Returns:
        n rows in the order of the lists, targets in {1, 0, -1}, labels in alphabetical order.

    Raises:
        UserError: if the layout is not there, a list is damaged or differs from the others, or images are not on disk.
    """
    base = _find(root)
    lists = base / "ImageSets" / "Main"
    meaning = {1: PRESENT, -1: ABSENT, 0: {"ignore": UNKNOWN, "positive": PRESENT, "negative": ABSENT}[difficult]}
    image_ids, _ = _read_list(lists, VOC_LABELS[0], split)
    targets = np.empty((len(image_ids), len(VOC_LABELS)), np.int8)
    num_difficult = 0
    for column, label in enumerate(VOC_LABELS):
        listed, values = _read_list(lists, label, split)
        if listed != image_ids:
            raise UserError(
                f"{lists / f'{label}_{split}.txt'}: lists other images, or in another order, than "
                f"{VOC_LABELS[0]}_{split}.txt; unpack VOC2007 again"
            )
        targets[:, column] = [meaning[value] for value in values]
        num_difficult += values.count(0)
    file_names = [f"{image_id}.jpg" for image_id in image_ids]
    require_images(base / "JPEGImages", file_names, lists / f"{VOC_LABELS[0]}_{split}.txt")
    became = {"ignore": "unknown", "positive": "present", "negative": "absent"}[difficult]
    note = f"{split}: {len(image_ids)} images, {num_difficult} labels seen only in difficult objects taken as {became}"
    folder = os.path.abspath(base / "JPEGImages")
    uris = [os.path.join(folder, name) for name in file_names]
    return SampleTable.from_columns(image_ids, uris, targets, VOC_LABELS, f"{base.name} {split}", (note,))


def _find(root: Path) -> Path:
    for base in (root, root / "VOC2007", root / "VOCdevkit" / "VOC2007"):
        if (base / "ImageSets" / "Main").is_dir():
            return base
    raise UserError(
        f"{root}: no ImageSets/Main in it, in VOC2007/ or in VOCdevkit/VOC2007/; give the folder of VOC2007"
    )


def _read_list(lists: Path, label: str, split: str) -> tuple[list[str], list[int]]:
    """The image ids and the values in {1, 0, -1} of one class."""
    path = lists / f"{label}_{split}.txt"
    if not path.is_file():
        splits = sorted(other.stem.removeprefix(f"{label}_") for other in lists.glob(f"{label}_*.txt"))
        raise UserError(
            f"{path}: no such file; unpack that part of VOC2007 or choose from: {', '.join(splits) or 'none'}"
        )
    image_ids: list[str] = []
    values: list[int] = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2 or fields[1] not in ("1", "0", "-1"):
            raise UserError(f"{path}, line {number}: {line!r} is not an image id and 1, 0 or -1; correct the line")
        image_ids.append(fields[0])
        values.append(int(fields[1]))
    if not image_ids or len(set(image_ids)) < len(image_ids):
        raise UserError(f"{path}: {'lists an image twice' if image_ids else 'is empty'}; unpack VOC2007 again")
    return image_ids, values
