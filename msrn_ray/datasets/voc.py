"""Reads PASCAL VOC2007 and VOC2012: in `ImageSets/Main/<class>_<split>.txt`, 1 is present, -1 absent, 0 only difficult objects.

`Annotations/<image>.xml` lists the objects of an image. If these files exist, they are compared with the class files.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..io.storage import Location
from ..types import ABSENT, PRESENT, UNKNOWN, SampleTable
from .image_uris import MissingImages, find_images, missing_notes, uris_below
from .split_names import SPLIT_WORDS
from .text_files import first_few, read_lines, require_unique, suggest_folder
from .xml_files import read_xml

VOC_LABELS = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
YEARS = (2007, 2012)
Difficult = Literal["ignore", "positive", "negative"]
_DIFFICULT_TARGETS: dict[Difficult, tuple[int, str]] = {
    **{"ignore": (UNKNOWN, "unknown"), "positive": (PRESENT, "present"), "negative": (ABSENT, "absent")}
}
# The values of a class file. Of several objects of a class the largest value counts: an easy object overrides a difficult one
_IN_EASY, _IN_DIFFICULT, _IN_NONE = 1, 0, -1
_WORDS = {_IN_EASY: "present", _IN_NONE: "absent", _IN_DIFFICULT: "difficult"}
_XML_THREADS = 16  # a remote XML file costs a round trip, so read several at once


def read_voc(
    root: Location,
    split: str,
    *,
    difficult: Difficult = "ignore",
    year: int | None = None,
    missing_images: MissingImages = "error",
) -> SampleTable:
    """Read one split of the 20 classes.

    Labels come from the class files, as in the official evaluation. If an XML file calls a class present and the class file calls it
    absent, or the reverse, that is an error. If they differ only on what is difficult, a note gives the number of differences.

    Args:
        root: `VOC2007` or `VOC2012`, the `VOCdevkit` around it, or the folder that holds `VOCdevkit`.
        split: "train", "val", "trainval" or "test".
        difficult: the target of a class that an image shows only in objects marked difficult: unknown (-1; the official
            evaluation leaves these out), present or absent.
        year: 2007 or 2012; None: see `find_voc`.
        missing_images: whether missing images are an error or left out.

    Returns:
        n rows in the order of the lists, targets in {1, 0, -1}, labels in alphabetical order.

    Raises:
        UserError: if the folder has another layout, a list is damaged or contradicts the other lists or the XML, or images are missing.
    """
    base = find_voc(root, year)
    lists = base / "ImageSets" / "Main"
    class_lists = {label: _read_list(lists, label, split) for label in VOC_LABELS}
    image_ids, _ = class_lists[VOC_LABELS[0]]
    for label, (listed_ids, _) in class_lists.items():
        if listed_ids != image_ids:
            raise UserError(
                f"{lists / f'{label}_{split}.txt'}: lists other images, or in another order, than "
                f"{VOC_LABELS[0]}_{split}.txt; unpack {base.name} again"
            )
    values = np.array([column for _, column in class_lists.values()], np.int8).T
    file_names = [f"{image_id}.jpg" for image_id in image_ids]
    folder = base / "JPEGImages"
    found = find_images(folder, file_names, lists / f"{VOC_LABELS[0]}_{split}.txt", missing_images)
    notes = [*missing_notes(split, found), *_compare_with_xml(base, split, image_ids, values)]

    rows = np.flatnonzero(found)
    difficult_target, target_name = _DIFFICULT_TARGETS[difficult]
    only_difficult = values == _IN_DIFFICULT
    targets = np.where(only_difficult, difficult_target, np.where(values == _IN_EASY, PRESENT, ABSENT)).astype(np.int8)
    num_difficult = np.count_nonzero(only_difficult[rows])
    notes.append(
        f"{split}: {len(rows)} images, {num_difficult} labels seen only in difficult objects are taken as {target_name}"
    )
    source = f"{base.name} {split}"
    samples = SampleTable.from_columns(
        image_ids, uris_below(folder, file_names), targets, VOC_LABELS, source, tuple(notes)
    )
    return samples.take(rows)


def find_voc(root: Location, year: int | None) -> Location:
    """Return the folder with `ImageSets/Main`: `root`, or `VOC<year>` in it or its `VOCdevkit`; without a year, 2007 before 2012.

    Raises:
        UserError: if there is no such folder.
    """
    if year not in (None, *YEARS):
        raise UserError(f"data.year {year}: VOC has {' and '.join(map(str, YEARS))}; choose one of them")
    years = YEARS if year is None else (year,)
    excluded = {f"VOC{candidate}" for candidate in YEARS if candidate not in years}
    inner = [f"{parent}VOC{candidate}" for candidate in years for parent in ("", "VOCdevkit/")]

    def base_in(folder: Location) -> Location | None:
        bases = [*(() if folder.name in excluded else (folder,)), *(folder / name for name in inner)]
        return next((base for base in bases if (base / "ImageSets" / "Main").is_dir()), None)

    base = base_in(root)
    if base is None:
        _refuse_flat(root)
        suggestion = suggest_folder(root, lambda folder: base_in(folder) is not None)
        raise UserError(
            f"{root}: no ImageSets/Main in it, in {'/, '.join(inner[:-1])}/ or in {inner[-1]}/;"
            f" give the folder of VOC{years[0]}{suggestion}"
        )
    return base


def _refuse_flat(root: Location) -> None:
    """Refuse XML files beside the images, as LabelImg and Roboflow write them; raises UserError with what to do."""
    if not root.is_dir():
        return
    inner = [name.rstrip("/") for name in root.names() if name.endswith("/")]
    for folder in ("", *(name for name in inner if name.lower() in (*SPLIT_WORDS, "annotations"))):
        num_files = sum(name.lower().endswith(".xml") for name in (root / folder if folder else root).names())
        if num_files:
            raise UserError(
                f"{root}: no ImageSets/Main, but {num_files} .xml in {folder or root.name}/: Pascal VOC annotations per image, as"
                " LabelImg and Roboflow export them, not the VOC benchmark. Export them as a multi-label table (Roboflow:"
                " Multi Label Classification), or write a manifest with a line per image, the <name> of its objects as labels"
                " and the split (image,labels,split)"
            )


def _read_list(lists: Location, label: str, split: str) -> tuple[list[str], list[int]]:
    """Return the image ids and the values in {1, 0, -1} of one class."""
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
    """Compare `values` ([n, 20] of the class files) with the XML files; return notes on missing files and differences.

    Raises:
        UserError: if only one of them has a class, naming file and image.
    """
    folder = base / "Annotations"
    names = set(folder.names(missing_ok=True))
    rows = [row for row, image_id in enumerate(image_ids) if f"{image_id}.xml" in names]
    notes = []
    if len(rows) < len(image_ids):
        num_without = len(image_ids) - len(rows)
        notes.append(f"{split}: {num_without} of {len(image_ids)} images have no XML to compare the class files with")
    with ThreadPoolExecutor(_XML_THREADS) as pool:
        objects = list(pool.map(lambda row: _read_objects(folder / f"{image_ids[row]}.xml"), rows))
    in_xml = np.array(objects, np.int8).reshape(len(rows), len(VOC_LABELS))
    in_lists = values[rows]
    contradicting = ((in_lists == _IN_EASY) & (in_xml == _IN_NONE)) | ((in_lists == _IN_NONE) & (in_xml == _IN_EASY))
    if contradicting.any():
        row, column = np.argwhere(contradicting)[0]
        image_id, label = image_ids[rows[row]], VOC_LABELS[column]
        list_word, xml_word = ("", "no ") if in_lists[row, column] == _IN_EASY else ("no ", "")
        raise UserError(
            f"{base / 'ImageSets' / 'Main' / f'{label}_{split}.txt'}: image {image_id} has {list_word}{label}, but {xml_word}{label}"
            f" in {folder / f'{image_id}.xml'}; {np.count_nonzero(contradicting)} such contradictions: correct the wrong file,"
            " or remove Annotations/ to use the class files alone"
        )
    differ = np.argwhere(in_lists != in_xml)
    if len(differ):
        examples = [f"{image_ids[rows[row]]} {VOC_LABELS[column]}" for row, column in differ]
        kinds = Counter(
            f"{_WORDS[int(in_lists[row, column])]} / {_WORDS[int(in_xml[row, column])]}" for row, column in differ
        )
        counts = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
        notes.append(
            f"{split}: class files and XML differ in {len(differ)} labels on what is difficult; the class files are used"
            f" ({counts}; {first_few(examples)})"
        )
    return notes


def _read_objects(path: Location) -> list[int]:
    """Return the value of each class as a class file would give it, from the objects of an image."""
    root = read_xml(path, "unpack Annotations/ again")
    values = dict.fromkeys(VOC_LABELS, _IN_NONE)
    for entry in root.findall("object"):
        label, difficult = (entry.findtext("name") or "").strip(), (entry.findtext("difficult") or "0").strip()
        if label not in VOC_LABELS or difficult not in ("0", "1"):
            problem = (
                f"difficult={difficult!r}, not 0 or 1" if label in VOC_LABELS else f"the name {label!r}, no VOC class"
            )
            raise UserError(f"{path}: has an object with {problem}; correct it")
        values[label] = max(values[label], _IN_DIFFICULT if difficult == "1" else _IN_EASY)
    return list(values.values())
