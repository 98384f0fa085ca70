"""Reads the COCO layout: `annotations/instances_{split}{year}.json` beside the image folder `{split}{year}/`."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from ..errors import UserError
from ..types import PRESENT, SampleTable

YEARS = (2014, 2017)
FIELDS: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str},
    "categories": {"id": int, "name": str},
    "annotations": {"id": int, "image_id": int, "category_id": int},
}


def read_coco(root: Path, split: str, *, keep_unlabelled: bool, crowd: bool = True) -> SampleTable:
    """Reads one split; a label is present where the image has at least one annotation of that category.

    Args:
        root: the folder that holds `annotations/` and the image folders.
        split: "train" or "val"; the year is 2014 if that file is there, else 2017.
        keep_unlabelled: whether images without a label stay in, as rows of zeros.
        crowd: whether annotations of crowds (`iscrowd` = 1) count.

    Returns:
        n rows in the order of image id, targets in {1, 0}. Labels are all categories of the file in alphabetical order,
        which is the order of the authors' checkpoints and is not the order of category id.

    Raises:
        UserError: if the layout is not there, the file is damaged or contradicts itself, or images are not on disk.
    """
    name = f"{split}{_find_year(root, split)}"
    path = root / "annotations" / f"instances_{name}.json"
    coco = _index(path, crowd)

    categories = sorted(coco.cats, key=lambda category: str(coco.cats[category]["name"]))
    label_names = tuple(coco.cats[category]["name"] for category in categories)
    image_ids = np.array(sorted(coco.imgs), dtype=np.int64)
    file_names = [coco.imgs[image]["file_name"] for image in image_ids.tolist()]
    require_images(root / name, file_names, path)

    targets = np.zeros((len(image_ids), len(categories)), np.int8)
    for column, category in enumerate(categories):
        targets[np.searchsorted(image_ids, coco.catToImgs.get(category, [])), column] = PRESENT

    labelled = targets.any(1)
    verb = "kept" if keep_unlabelled else "dropped"
    note = f"{name}: {len(image_ids)} images, {np.count_nonzero(~labelled)} without a label {verb}"
    rows = np.arange(len(image_ids)) if keep_unlabelled else np.flatnonzero(labelled)
    if len(rows) == 0:
        raise UserError(f"{path}: no image is left to use ({note}); check that this is the file of labels")
    folder = os.path.abspath(root / name)
    return SampleTable.from_columns(
        [str(image_ids[row]) for row in rows],
        [os.path.join(folder, file_names[row]) for row in rows],
        targets[rows],
        label_names,
        path.name,
        (note,),
    )


def has_split(root: Path, split: str) -> bool:
    """Whether `root` holds the label file of this split."""
    return any((root / "annotations" / f"instances_{split}{year}.json").is_file() for year in YEARS)


def require_images(folder: Path, names: Sequence[str], listed_in: Path) -> None:
    """Checks that the images a label file lists are in `folder`, with one listing per folder and no stat per image.

    Args:
        folder: where the images are.
        names: [n] paths relative to `folder`, with forward slashes.
        listed_in: the label file, for the message.

    Raises:
        UserError: if a name leads out of `folder`, the folder is missing, or images are not in it.
    """
    for name in names:
        if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
            raise UserError(
                f"{listed_in}: the file name {name!r} leads out of {folder}; make it relative to that folder"
            )
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, but {listed_in} lists {len(names)} images in it; put them there")
    on_disk: set[str] = set()
    for part in {os.path.dirname(name) for name in names}:
        # A sub-folder that is missing shows up as missing images below.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder / part) as entries:
            on_disk.update(os.path.join(part, entry.name) for entry in entries)
    missing = [name for name in names if name not in on_disk]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of the {len(names)} images listed in {listed_in} are not there "
            f"({_first(missing)}); finish the download or unpacking, or take them out of the list"
        )


def _find_year(root: Path, split: str) -> int:
    for year in YEARS:
        if (root / "annotations" / f"instances_{split}{year}.json").is_file():
            return year
    wanted = " or ".join(f"annotations/instances_{split}{year}.json" for year in YEARS)
    mend = f"give the folder that holds annotations/ and {split}{YEARS[0]}/ or {split}{YEARS[1]}/"
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; {mend}")
    inside = sorted(root.iterdir())
    near = [folder for folder in (root.absolute().parent, *inside) if has_split(folder, split)]
    hint = f" (did you mean {near[0]}?)" if near else ""
    found = "nothing" if not inside else f"only {_first(entry.name for entry in inside)}"
    raise UserError(f"{root}: looked for {wanted}, found {found}; {mend}{hint}")


def _index(path: Path, crowd: bool) -> COCO:
    """The file as pycocotools indexes it, checked so that every reference in it leads somewhere."""
    try:
        dataset = json.loads(path.read_bytes())
    except ValueError as error:  # neither UTF-8 nor JSON
        raise UserError(f"{path}: not a JSON file ({error}); download or unpack it again") from error
    for section in FIELDS:
        if not isinstance(dataset, dict) or not isinstance(dataset.get(section), list):
            raise UserError(f'{path}: has no list "{section}"; give an "instances" file in COCO\'s format')
    _check_entries(path, "images", dataset["images"])
    _check_entries(path, "categories", dataset["categories"])
    _check_unique(path, '"id" in "images"', (image["id"] for image in dataset["images"]))
    _check_unique(path, '"id" in "categories"', (category["id"] for category in dataset["categories"]))
    _check_unique(path, '"name" in "categories"', (category["name"] for category in dataset["categories"]))

    coco = COCO()
    try:
        if not crowd:
            dataset["annotations"] = [entry for entry in dataset["annotations"] if not entry.get("iscrowd")]
        coco.dataset = dataset
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            coco.createIndex()
    except (AttributeError, KeyError, TypeError):
        # Looking at each of 600,000 annotations takes time, so it is done only to say which one is wrong.
        _check_entries(path, "annotations", dataset["annotations"])
        raise
    for field, used, known in (("image_id", coco.imgToAnns, "images"), ("category_id", coco.catToImgs, "categories")):
        unknown = [number for number in used if number not in (coco.imgs if known == "images" else coco.cats)]
        if unknown:
            raise UserError(
                f'{path}: "annotations" have {len(unknown)} values of "{field}" that "{known}" lacks '
                f"({_first(unknown)}); add them there or take those annotations out"
            )
    return coco


def _check_entries(path: Path, section: str, entries: list[Any]) -> None:
    for position, entry in enumerate(entries):
        for field, kind in FIELDS[section].items():
            if not isinstance(entry, dict) or not isinstance(entry.get(field), kind):
                what = "a whole number" if kind is int else "a text"
                raise UserError(
                    f'{path}: entry {position} of "{section}" needs a field "{field}" with {what}; correct it'
                )


def _check_unique(path: Path, what: str, values: Iterable[int | str]) -> None:
    twice = [value for value, times in Counter(values).items() if times > 1]
    if twice:
        raise UserError(
            f"{path}: {len(twice)} values of {what} occur more than once ({_first(twice)}); make them unique"
        )


def _first(items: Iterable[object], limit: int = 3) -> str:
    """The first few, for a message."""
    texts = [str(item) for item in items]
    return ", ".join(texts[:limit]) + (", ..." if len(texts) > limit else "")
