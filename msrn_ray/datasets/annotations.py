"""What an exported label file says, and the sample table of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from ..io.storage import Location
from ..types import PRESENT, SampleTable
from .image_lookup import locate_images
from .image_uris import MissingImages, find_local, missing_notes, require_images
from .manifest import CustomImages
from .split_names import SPLIT_WORDS, SPLITS
from .text_files import decode_text, first_few, read_data, require_unique, require_utf8

UNASSIGNED = "unassigned"


class Annotations(NamedTuple):
    """The labels of n images; labels that an image does not list are absent.

    Attributes:
        form: the name of the format, for notes.
        images: [n] paths, or names that are looked up.
        labels: [n] lists of the labels that are present.
        splits: [n] words for the splits, "" for none; None if the file has no splits.
        label_names: all labels in the order of the file; None: the labels that occur, in alphabetical order.
        notes: for the user.
    """

    form: str
    images: list[str]
    labels: list[list[str]]
    splits: list[str] | None = None
    label_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def read_whole(file: Location) -> str:
    """Return the text of a label file that exists; raises as `decode_text`."""
    return decode_text(file, read_data(file, "name the label file (--data.root FILE)"))


def vertex_split(word: str) -> str:
    """Return the split that a word of Vertex AI names; "" for `unassigned`, whose split Vertex AI draws itself."""
    return "" if word.lower() == UNASSIGNED else {"validate": "validation"}.get(word.lower(), word)


def build_images(
    file: Location, annotations: Annotations, label_names: Sequence[str] | None, missing_images: MissingImages
) -> CustomImages:
    """Return the images of an export as a sample table.

    Args:
        file: the label file.
        annotations: its content.
        label_names: all labels in their order; None: those of the file.
        missing_images: whether a missing local image is an error or a row to leave out.

    Raises:
        UserError: if the file has no image or no label, repeats an image, lists an unknown label or split, or images are missing.
    """
    if not annotations.images:
        raise UserError(f"{file}: is {annotations.form}, but lists no image; export it again with all images")
    require_utf8(file, annotations.images)
    require_unique(file, "the image name", annotations.images)
    if label_names and annotations.label_names == tuple(map(str, range(len(label_names)))):
        annotations = _name_numbers(annotations, tuple(label_names))
    names = tuple(
        label_names or annotations.label_names or sorted({name for row in annotations.labels for name in row})
    )
    if not any(annotations.labels):
        raise UserError(f"{file}: is {annotations.form}, but no image has a label; export the finished annotations")
    targets = _encode(file, annotations, names)
    split = None if annotations.splits is None else _split_codes(file, annotations)
    images = pa.chunked_array([pa.array(annotations.images, pa.string())])
    uris, notes = locate_images(file, pc.replace_substring(images, "\\", "/"))
    found = find_local(uris)
    require_images(file, uris, found, missing_images)
    notes = (
        f"{file.name}: {len(images)} images, {len(names)} labels ({annotations.form})",
        *annotations.notes,
        *notes,
        *missing_notes(file.name, found),
    )
    samples = SampleTable.from_columns(images, uris, targets, names, file.name, notes)
    rows = np.flatnonzero(found)
    return CustomImages(samples.take(rows), None if split is None else split[rows])


def _name_numbers(annotations: Annotations, label_names: tuple[str, ...]) -> Annotations:
    labels = [[label_names[int(number)] for number in row] for row in annotations.labels]
    note = "the numbers of labels are their positions in data.labels, from 0"
    return annotations._replace(labels=labels, label_names=label_names, notes=(*annotations.notes, note))


def _encode(file: Location, annotations: Annotations, names: tuple[str, ...]) -> npt.NDArray[np.int8]:
    codes = {name: position for position, name in enumerate(names)}
    targets = np.zeros((len(annotations.images), len(names)), np.int8)
    for row, labels in enumerate(annotations.labels):
        for label in labels:
            if label not in codes:
                raise UserError(
                    f"{file}: the label {label!r} of image {annotations.images[row]!r} is not among the {len(names)} labels"
                    f" ({first_few(names)}); correct it or add it there"
                )
            targets[row, codes[label]] = PRESENT
    return targets


def _split_codes(file: Location, annotations: Annotations) -> npt.NDArray[np.int8] | None:
    assert annotations.splits is not None
    without = [image for image, split in zip(annotations.images, annotations.splits, strict=True) if not split]
    if len(without) == len(annotations.images):
        return None
    if without:
        raise UserError(
            f"{file}: {len(without)} of {len(annotations.images)} images have no split ({first_few(without)}), but the others"
            " have one; give each image a split, or none"
        )
    codes = []
    for image, split in zip(annotations.images, annotations.splits, strict=True):
        word = SPLIT_WORDS.get(split.strip().lower())
        if word is None:
            raise UserError(
                f"{file}: the split {split!r} of image {image!r} is none of {', '.join(SPLIT_WORDS)}; correct it"
            )
        codes.append(SPLITS.index(word))
    return np.array(codes, np.int8)
