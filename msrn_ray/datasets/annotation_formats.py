"""Recognises label files that annotation tools, cloud services and data sets publish, by their content.

JSON and JSON Lines: see `annotation_json`. Here: CVAT for images (XML), CelebA (txt), SageMaker (.lst) and Vertex AI (CSV).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable

from ..errors import UserError
from ..io.storage import Location
from .annotation_json import read_json_export, read_json_lines_export
from .annotations import UNASSIGNED, Annotations, read_whole, vertex_split
from .image_uris import is_image
from .xml_files import read_xml

_HEAD_BYTES = 65_536  # enough for a header or the first line
_ML_USE = {"training", "train", "validation", "validate", "test", UNASSIGNED}


def read_annotation_file(file: Location) -> Annotations | None:
    """Return the content of an exported label file, or None if it is none of the formats, such as a table with a header.

    Raises:
        UserError: if the file is one of the formats, but damaged; or it is JSON or XML of another kind.
    """
    suffix = re.sub(r".*(?=\.)", "", file.name.lower())
    if suffix not in _READERS or not file.is_file():
        return None
    with file.opened_input() as stream:
        head = bytes(stream.read(_HEAD_BYTES))
    return _READERS[suffix](file, head.decode("utf-8-sig", errors="replace"))


def _read_cvat(file: Location, head: str) -> Annotations | None:
    """Read CVAT for images 1.1: `<image name= subset=>` with `<tag label=>`; boxes and other shapes count as labels too."""
    root = read_xml(file, "name the label file")
    if root.tag != "annotations":
        raise UserError(
            f"{file}: is XML with the root <{root.tag}>, but of XML only CVAT for images is read, whose root is <annotations>; VOC needs"
            " --data.dataset voc"
        )
    images = root.findall("image")
    labels = [[shape.attrib["label"] for shape in image if "label" in shape.attrib] for image in images]
    names = [(name.text or "").strip() for name in root.findall(".//labels/label/name")]
    used = {label for row in labels for label in row}
    known = tuple(dict.fromkeys(names)) if names and used <= {*names} else None
    splits = [image.get("subset", "") for image in images]
    named = [split if split.lower() != "default" else "" for split in splits]
    return Annotations("CVAT XML", [image.get("name", "") for image in images], labels, named, known)


def _read_vertex_csv(file: Location, head: str) -> Annotations | None:
    """Read `[ml_use,]image,label,label,...`, without a header."""
    first = next(csv.reader([head.splitlines()[0]] if head.strip() else []), [])
    if len(first) < 2:
        return None
    has_split = first[0].strip().lower() in _ML_USE and (is_image(first[1].strip()) or "://" in first[1])
    if not has_split and not first[0].startswith("gs://"):
        return None
    images, labels, splits = [], [], []
    for number, row in enumerate(csv.reader(read_whole(file).splitlines()), 1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        split = cells.pop(0) if has_split else ""
        if (has_split and split.lower() not in {*_ML_USE, ""}) or not cells or not cells[0]:
            raise UserError(
                f"{file}, line {number}: does not begin with a split and an image, as line 1 does; correct it"
            )
        images.append(cells[0])
        labels.append([cell for cell in cells[1:] if cell])
        splits.append(vertex_split(split))
    return Annotations("Vertex AI CSV without a header", images, labels, splits)


def _read_celeba(file: Location, head: str) -> Annotations | None:
    """Read CelebA's `list_attr_celeba.txt`: the number of images, the labels, then an image and 1 or -1 per label in each line."""
    lines = head.split("\n", 3)
    if len(lines) < 3 or not lines[0].strip().isdigit():
        return None
    names = tuple(lines[1].split())
    if len(lines[2].split()) != len(names) + 1 or not {*lines[2].split()[1:]} <= {"1", "-1"}:
        return None
    images, labels = [], []
    for number, line in enumerate(read_whole(file).splitlines()[2:], 3):
        image, *values = line.split() or [""]
        if not image:
            continue
        if len(values) != len(names) or not {*values} <= {"1", "-1"}:
            raise UserError(f"{file}, line {number}: needs an image and {len(names)} values, each 1 or -1; correct it")
        images.append(image)
        labels.append([name for name, value in zip(names, values, strict=True) if value == "1"])
    if len(images) != int(lines[0]):
        raise UserError(f"{file}: says {lines[0].strip()} images, but lists {len(images)}; download it again")
    note = f"{file.name}: -1 is absent, as CelebA defines it"
    return Annotations("CelebA attributes", images, labels, _celeba_splits(file, images), names, (note,))


def _celeba_splits(file: Location, images: list[str]) -> list[str] | None:
    partition = file.parent / "list_eval_partition.txt"
    if not partition.is_file():
        return None
    words = {"0": "train", "1": "val", "2": "test"}
    pairs = [line.split() for line in read_whole(partition).splitlines() if line.strip()]
    wrong = next((number for number, pair in enumerate(pairs, 1) if len(pair) != 2 or pair[1] not in words), None)
    if wrong is not None:
        raise UserError(f"{partition}, line {wrong}: needs an image and 0 (train), 1 (val) or 2 (test); correct it")
    split = {image: words[number] for image, number in pairs}
    return [split.get(image, "") for image in images]


def _read_lst(file: Location, head: str) -> Annotations | None:
    """Read SageMaker's `.lst`: number, one flag per label or one class number, and the path, with tabs between."""
    images, labels = [], []
    widths: set[int] = set()
    classes: set[int] = set()
    for number, line in enumerate(read_whole(file).splitlines(), 1):
        _, *values, image = line.split("\t") if line.count("\t") >= 2 else ("", "")
        numbers = [re.sub(r"\.0+$", "", value.strip()) for value in values]
        widths.add(len(numbers))
        if not image.strip() or len(widths) > 1 or not all(value.isdigit() for value in numbers):
            raise UserError(
                f"{file}, line {number}: needs a number, the same count of flags in each line and a path, with tabs between;"
                " correct it"
            )
        if len(numbers) > 1 and not {*numbers} <= {"0", "1"}:
            raise UserError(f"{file}, line {number}: holds flags other than 0 and 1; correct it")
        images.append(image.strip())
        labels.append(numbers if len(numbers) == 1 else [str(at) for at, flag in enumerate(numbers) if flag == "1"])
        classes.update(range(len(numbers)) if len(numbers) > 1 else map(int, numbers))
    form = "SageMaker .lst, " + ("a class number per image" if widths == {1} else "a flag per label")
    return Annotations(form, images, labels, None, tuple(map(str, sorted(classes))))


_READERS: dict[str, Callable[[Location, str], Annotations | None]] = {
    **{
        ".xml": _read_cvat,
        ".json": read_json_export,
        ".lst": _read_lst,
        ".txt": _read_celeba,
        ".csv": _read_vertex_csv,
    },
    **{".jsonl": read_json_lines_export, ".manifest": read_json_lines_export, ".ndjson": read_json_lines_export},
}
