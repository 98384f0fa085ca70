"""Reads PASCAL VOC2007 and VOC2012: in `ImageSets/Main/<class>_<split>.txt` 1 is present, -1 absent, 0 only difficult objects.

`Annotations/<image>.xml` say the same object by object; where they are there, the two are compared.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..io.storage import Location
from ..types import ABSENT, PRESENT, UNKNOWN, SampleTable
from .image_uris import MissingImages, find_images, missing_notes, uris_below
from .text_files import first_few, hint, read_data, read_lines, require_unique

VOC_LABELS = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
YEARS = (2007, 2012)
Difficult = Literal["ignore", "positive", "negative"]
_IN_EASY, _IN_NONE, _IN_DIFFICULT = 1, -1, 0  # the values of a class file
_REQUESTS = 16  # XML files read at once: on another machine each costs a round trip


def read_voc(
    root: str | Path | Location,
    split: str,
    *,
    difficult: Difficult = "ignore",
    year: int | None = None,
    missing_images: MissingImages = "error",
) -> SampleTable:
    """Reads one split of the 20 classes.

    Labels are those of the class files, as in the official evaluation. The XML files must not contradict them: a class that one calls
    present and the other absent is an error. Where they differ only on what is difficult, a note says how often.

    Args:
        root: `VOC2007` or `VOC2012`, the `VOCdevkit` around it, or the folder that holds `VOCdevkit`; a path or URI.
        split: "train", "val", "trainval" or "test".
        difficult: what a class is that an image shows only in objects marked difficult: unknown (-1; the official
            evaluation leaves these out), present or absent.
        year: 2007 or 2012; None: as `find_voc` says.
        missing_images: whether listed images that are not there are an error or left out.

    Returns:
        n rows in the order of the lists, targets in {1, 0, -1}, labels in alphabetical order.

    Raises:
        UserError: if the layout is not there, a list is damaged or differs from the others or from the XML, or images are not there.
    """
    base = find_voc(Location.of(root), year)
    lists = base / "ImageSets" / "Main"
    read = {label: _read_list(lists, label, split) for label in VOC_LABELS}
    image_ids, _ = read[VOC_LABELS[0]]
    for label, (listed, _) in read.items():
        if listed != image_ids:
            raise UserError(
                f"{lists / f'{label}_{split}.txt'}: lists other images, or in another order, than "
                f"{VOC_LABELS[0]}_{split}.txt; unpack {base.name} again"
            )
    values = np.array([column for _, column in read.values()], np.int8).T
    file_names = [f"{image_id}.jpg" for image_id in image_ids]
    folder = base / "JPEGImages"
    found = find_images(folder, file_names, lists / f"{VOC_LABELS[0]}_{split}.txt", missing_images)
    notes = [*missing_notes(split, found), *_compare_with_xml(base, split, image_ids, values)]

    rows = np.flatnonzero(found)
    meaning = {"ignore": UNKNOWN, "positive": PRESENT, "negative": ABSENT}[difficult]
    became = {"ignore": "unknown", "positive": "present", "negative": "absent"}[difficult]
    only_difficult = values == _IN_DIFFICULT
    targets = np.where(only_difficult, meaning, np.where(values == _IN_EASY, PRESENT, ABSENT)).astype(np.int8)
    notes.append(
        f"{split}: {len(rows)} images, {np.count_nonzero(only_difficult[rows])} labels seen only in difficult objects taken as {became}"
    )
    source = f"{base.name} {split}"
    samples = SampleTable.from_columns(
        image_ids, uris_below(folder, file_names), targets, VOC_LABELS, source, tuple(notes)
    )
    return samples.take(rows)


def find_voc(root: Location, year: int | None) -> Location:
    """The folder that holds `ImageSets/Main`: `root`, or `VOC<year>` in it or in its `VOCdevkit`; for no year, 2007 before 2012.

    Raises:
        UserError: if there is none.
    """
    if year not in (None, *YEARS):
        raise UserError(f"data.year {year}: VOC is read for {' and '.join(map(str, YEARS))}")
    years = YEARS if year is None else (year,)
    others = {f"VOC{one}" for one in YEARS if one not in years}
    inner = [f"{folder}VOC{one}" for one in years for folder in ("", "VOCdevkit/")]

    def base_in(place: Location) -> Location | None:
        bases = [*(() if place.name in others else (place,)), *(place / name for name in inner)]
        return next((base for base in bases if (base / "ImageSets" / "Main").is_dir()), None)

    base = base_in(root)
    if base is None:
        near = hint(root, lambda place: base_in(place) is not None)
        raise UserError(
            f"{root}: no ImageSets/Main in it, in {'/, '.join(inner[:-1])}/ or in {inner[-1]}/; give the folder of VOC{years[0]}{near}"
        )
    return base


def _read_list(lists: Location, label: str, split: str) -> tuple[list[str], list[int]]:
    """The image ids and the values in {1, 0, -1} of one class."""
    path = lists / f"{label}_{split}.txt"
    if not path.is_file():
        names = (name.removesuffix(".txt") for name in lists.names())
        splits = [name.removeprefix(f"{label}_") for name in names if name.startswith(f"{label}_")]
        raise UserError(f"{path}: no such file; unpack that part of VOC or choose from: {', '.join(splits) or 'none'}")
    image_ids: list[str] = []
    values: list[int] = []
    for number, line in enumerate(read_lines(path, "unpack VOC again"), 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2 or fields[1] not in ("1", "0", "-1"):
            raise UserError(f"{path}, line {number}: {line!r} is not an image id and 1, 0 or -1; correct the line")
        image_ids.append(fields[0])
        values.append(int(fields[1]))
    if not image_ids:
        raise UserError(f"{path}: is empty; unpack VOC again")
    require_unique(path, "image id", image_ids)
    return image_ids, values


def _compare_with_xml(base: Location, split: str, image_ids: list[str], values: npt.NDArray[np.int8]) -> list[str]:
    """Notes on what the XML files say of `values` ([n, 20] of the class files).

    Raises:
        UserError: where one has a class that the other does not have, naming file and image.
    """
    folder = base / "Annotations"
    names = set(folder.names(missing_ok=True))
    rows = [row for row, image_id in enumerate(image_ids) if f"{image_id}.xml" in names]
    notes = []
    if len(rows) < len(image_ids):
        num_without = len(image_ids) - len(rows)
        notes.append(f"{split}: {num_without} of {len(image_ids)} images have no XML to compare the class files with")
    with ThreadPoolExecutor(_REQUESTS) as pool:
        objects = list(pool.map(lambda row: _read_objects(folder / f"{image_ids[row]}.xml"), rows))
    in_xml = np.full((len(rows), len(VOC_LABELS)), _IN_NONE, np.int8)
    for row, seen in enumerate(objects):
        for label, is_difficult in sorted(seen, reverse=True):  # an easy object is stronger than a difficult one
            in_xml[row, VOC_LABELS.index(label)] = _IN_DIFFICULT if is_difficult else _IN_EASY

    in_lists = values[rows]
    against = ((in_lists == _IN_EASY) & (in_xml == _IN_NONE)) | ((in_lists == _IN_NONE) & (in_xml == _IN_EASY))
    if against.any():
        row, column = np.argwhere(against)[0]
        image_id, label = image_ids[rows[row]], VOC_LABELS[column]
        here, there = ("", "no ") if in_lists[row, column] == _IN_EASY else ("no ", "")
        raise UserError(
            f"{base / 'ImageSets' / 'Main' / f'{label}_{split}.txt'}: image {image_id} has {here}{label}, but {there}{label} in"
            f" {folder / f'{image_id}.xml'}; {np.count_nonzero(against)} such contradictions: correct the wrong file, or take"
            " Annotations/ away to go by the class files alone"
        )
    differ = np.argwhere(in_lists != in_xml)
    if len(differ):
        examples = [f"{image_ids[rows[row]]} {VOC_LABELS[column]}" for row, column in differ]
        kinds = Counter(
            f"{_WORDS[int(in_lists[row, column])]} / {_WORDS[int(in_xml[row, column])]}" for row, column in differ
        )
        counts = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
        notes.append(
            f"{split}: class files and XML differ in {len(differ)} labels on what is difficult, the class files count"
            f" ({counts}; {first_few(examples)})"
        )
    return notes


_WORDS = {_IN_EASY: "present", _IN_NONE: "absent", _IN_DIFFICULT: "difficult"}


def _read_objects(path: Location) -> set[tuple[str, bool]]:
    """The classes of an image's objects, and whether the object is difficult."""
    try:
        root = ET.fromstring(read_data(path, "unpack Annotations/ again"))
    except (ET.ParseError, ValueError, LookupError) as error:  # the latter two for encodings that it does not know
        raise UserError(f"{path}: not an XML file ({error}); unpack it again") from None
    objects = set()
    for entry in root.findall("object"):
        label, difficult = (entry.findtext("name") or "").strip(), (entry.findtext("difficult") or "0").strip()
        if label not in VOC_LABELS or difficult not in ("0", "1"):
            what = (
                f"difficult={difficult!r}, not 0 or 1" if label in VOC_LABELS else f"the name {label!r}, no VOC class"
            )
            raise UserError(f"{path}: has an object with {what}; correct it")
        objects.add((label, difficult == "1"))
    return objects
