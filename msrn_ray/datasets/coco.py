"""Reads the COCO layout: `annotations/instances_{split}{year}.json` beside the image folder `{split}{year}/`."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from ..errors import UserError
from ..io.storage import Location
from ..types import PRESENT, SampleTable
from .image_uris import MissingImages, find_images, select_rows, uris_below
from .text_files import first_few, is_utf8, read_data, require_unique, suggest_folder

YEARS = (2014, 2017)
_WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_FIELDS: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str},
    "categories": {"id": int, "name": str},
    "annotations": {"id": int, "image_id": int, "category_id": int},
}
_SHAPES = ("segmentation", "bbox", "keypoints")  # most of a file's bytes; labels do not need them


def read_coco(
    root: Location,
    split: str,
    *,
    keep_unlabelled: bool,
    crowd: bool = True,
    year: int | None = None,
    missing_images: MissingImages = "error",
) -> SampleTable:
    """Read one split. A label is present if the image has at least one annotation of that category.

    Args:
        root: the folder that holds `annotations/` and the image folders.
        split: "train", "val" or "test".
        keep_unlabelled: whether images without a label stay, as rows of zeros.
        crowd: whether annotations of crowds (`iscrowd` = 1) count.
        year: 2014 or 2017; None: 2014 if that file exists, else 2017.
        missing_images: whether missing images are an error or left out.

    Returns:
        n rows in the order of image id, targets in {1, 0}. Labels are all categories of the file in alphabetical order, as in the authors'
        checkpoints. The order of category ids differs.

    Raises:
        UserError: if the folder has another layout, the file is damaged or inconsistent, or images are missing.
    """
    name = f"{split}{find_year(root, split, year)}"
    path = _label_file(root, name)
    coco = _index(path, crowd)

    categories = sorted(coco.cats, key=lambda category: str(coco.cats[category]["name"]))
    label_names = tuple(coco.cats[category]["name"] for category in categories)
    image_ids = np.array(sorted(coco.imgs), dtype=np.int64)
    file_names = [coco.imgs[image]["file_name"] for image in image_ids.tolist()]
    folder = root / name
    refuse_windows_paths(path, file_names)
    found = find_images(folder, file_names, path, missing_images)

    targets = np.zeros((len(image_ids), len(categories)), np.int8)
    for column, category in enumerate(categories):
        targets[np.searchsorted(image_ids, coco.catToImgs.get(category, [])), column] = PRESENT

    ids = [str(image) for image in image_ids.tolist()]
    samples = SampleTable.from_columns(ids, uris_below(folder, file_names), targets, label_names, path.name)
    samples = select_rows(samples, name, keep_unlabelled, found)
    if len(samples) == 0:
        raise UserError(f"{path}: no image is left to use ({samples.notes[-1]}); check that this is the file of labels")
    return samples


def refuse_windows_paths(path: Location, file_names: Sequence[str]) -> None:
    """Refuse absolute paths of Windows, which no folder here holds.

    Raises:
        UserError: with their number and the first of them.
    """
    windows = [name for name in file_names if _WINDOWS_PATH.match(name)]
    if windows:
        raise UserError(
            f'{path}: {len(windows)} of {len(file_names)} values of "file_name" are absolute Windows paths of another machine'
            f" ({first_few(windows)}); write the names relative to the folder of the images, with forward slashes"
        )


def has_split(root: Location, split: str, year: int) -> bool:
    """Return whether `root` holds the label file of this split."""
    return _label_file(root, f"{split}{year}").is_file()


def find_year(root: Location, split: str, year: int | None = None) -> int:
    """Return the year of the label file of this split: `year` if given, else 2014 before 2017.

    Raises:
        UserError: if `root` holds no such file.
    """
    if year not in (None, *YEARS):
        raise UserError(f"data.year {year}: COCO has {' and '.join(map(str, YEARS))}; choose one of them")
    years = YEARS if year is None else (year,)
    for candidate in years:
        if has_split(root, split, candidate):
            return candidate
    wanted = " or ".join(f"annotations/instances_{split}{candidate}.json" for candidate in years)
    fix = f"give the folder that holds annotations/ and {' or '.join(f'{split}{candidate}/' for candidate in years)}"
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; {fix}")
    suggestion = suggest_folder(root, lambda folder: any(has_split(folder, split, candidate) for candidate in years))
    names = root.names()
    found = f"only {first_few(name.rstrip('/') for name in names)}" if names else "nothing"
    raise UserError(f"{root}: looked for {wanted}, found {found}; {fix}{suggestion}")


def _label_file(root: Location, name: str) -> Location:
    return root / "annotations" / f"instances_{name}.json"


def _index(path: Location, crowd: bool) -> COCO:
    """Return the file's index by pycocotools; every id in an annotation is known to exist."""
    data = read_data(path, "unpack COCO's annotations again")
    try:
        dataset = json.loads(data, object_hook=_without_shapes)
    except (ValueError, RecursionError) as error:  # neither UTF-8 nor JSON, or lists nested too deep
        raise UserError(f"{path}: not a JSON file ({error}); download or unpack it again") from error
    for section in _FIELDS:
        if not isinstance(dataset, dict) or not isinstance(dataset.get(section), list):
            raise UserError(f'{path}: has no list "{section}"; give an "instances" file in COCO\'s format')
    if not dataset["categories"]:
        raise UserError(f'{path}: "categories" is empty; give an "instances" file in COCO\'s format')
    _check_entries(path, "images", dataset["images"])
    _check_entries(path, "categories", dataset["categories"])
    require_unique(path, '"id" in "images"', (image["id"] for image in dataset["images"]))
    require_unique(path, '"id" in "categories"', (category["id"] for category in dataset["categories"]))
    require_unique(path, '"name" in "categories"', (category["name"] for category in dataset["categories"]))

    coco = COCO()
    try:
        if not crowd:
            dataset["annotations"] = [entry for entry in dataset["annotations"] if not entry.get("iscrowd")]
        coco.dataset = dataset
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            coco.createIndex()
    except (AttributeError, KeyError, TypeError):
        # Checking each of 600,000 annotations takes time, so do it only to find the wrong one for the message.
        _check_entries(path, "annotations", dataset["annotations"])
        raise
    for field, used, known in (("image_id", coco.imgToAnns, "images"), ("category_id", coco.catToImgs, "categories")):
        unknown = [number for number in used if number not in (coco.imgs if known == "images" else coco.cats)]
        if unknown:
            raise UserError(
                f'{path}: "annotations" have {len(unknown)} values of "{field}" that "{known}" lacks '
                f"({first_few(unknown)}); add them there or remove those annotations"
            )
    return coco


def _without_shapes(entry: dict[str, Any]) -> dict[str, Any]:
    """Drop outlines and boxes while the file is parsed: train2014 then takes a third of the memory."""
    for field in _SHAPES:
        entry.pop(field, None)
    return entry


def _check_entries(path: Location, section: str, entries: list[Any]) -> None:
    for position, entry in enumerate(entries):
        for field, kind in _FIELDS[section].items():
            if not isinstance(entry, dict) or not _fits(entry.get(field), kind):
                what = "a whole number" if kind is int else "a text"
                raise UserError(
                    f'{path}: entry {position} of "{section}" needs a field "{field}" with {what}; correct it'
                )


def _fits(value: Any, kind: type) -> bool:
    """Return whether the value is a text that can be encoded, or a whole number of 64 bits, as `kind` says."""
    if isinstance(value, str):
        return kind is str and is_utf8(value)
    return kind is int and isinstance(value, int) and abs(value) < 1 << 63
