"""Guesses the format of a data set from its files, so that a user can name the data alone."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import UserError
from ..io.storage import Location
from .image_uris import is_image
from .split_names import SPLIT_WORDS
from .text_files import first_few

LABEL_FILES = (".csv", ".csv.gz", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".manifest", ".xml", ".lst")
_COMPANIONS = ("class-descriptions", "list_eval_partition")  # files that belong to a label file
_SHOWN = 5


class Recognised(NamedTuple):
    """A data set whose format was guessed.

    Attributes:
        preset: the preset that reads it.
        root: its folder or label file.
        reason: what the guess relies on.
    """

    preset: str
    root: Location
    reason: str


def recognise(place: Location) -> Recognised:
    """Return the format of a data set by the names in its folder; label files are not opened.

    Raises:
        UserError: if nothing is there, no format fits, or several label files do.
    """
    if place.is_file():
        return Recognised("manifest", place, f"{place.name} is a file")
    if not place.is_dir():
        raise UserError(f"{place}: is no preset (`msrn presets` lists them), and no such file or folder exists")
    names = place.names()
    for preset, reason in _by_layout(place, names):
        return Recognised(preset, place, reason)
    files = [name for name in names if name.lower().endswith(LABEL_FILES) and not name.startswith(_COMPANIONS)]
    if len(files) == 1:
        return Recognised("manifest", place / files[0], f"{files[0]} is the only label file in the folder")
    if len(files) > 1:
        raise UserError(f"{place}: holds {len(files)} label files ({first_few(files)}); name the one to read")
    folders = [name.rstrip("/") for name in names if name.endswith("/")]
    if any(is_image(name) for folder in folders[:_SHOWN] for name in _two_levels(place / folder)):
        return Recognised("folders", place, f"it holds folders of images ({first_few(folders)})")
    raise UserError(
        f"{place}: no known format; it holds {first_few(names, _SHOWN) or 'nothing'}. Name the label file, or the preset and"
        " --data.root (`msrn presets` lists the presets)"
    )


def _by_layout(place: Location, names: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the presets whose layout the folder has, with the reason."""
    if "VOCdevkit/" in names or {"ImageSets/", "JPEGImages/"} <= {*names}:
        yield "voc2007", "it has the folders of PASCAL VOC"
    if "annotations/" in names and any(name.startswith("instances_") for name in (place / "annotations").names()):
        yield "coco2014", "it holds annotations/instances_*.json"
    if "ImageList/" in names or "nus_wid_data.csv" in names:
        yield "nuswide", "it holds the lists of NUS-WIDE"
    splits = [name for name in names if name.endswith("/") and name.rstrip("/").lower() in SPLIT_WORDS]
    inner = {folder: (place / folder.rstrip("/")).names() for folder in splits}
    for folder, files in {"": names, **inner}.items():
        for name in files:
            if name.endswith(".tar"):
                yield "webdataset", f"it holds {folder}{name}"
            if name in ("dataset_dict.json", "dataset_info.json", "metadata.jsonl", "metadata.csv") or name.endswith(
                ".arrow"
            ):
                yield "huggingface", f"it holds {folder}{name}"
    parquet = [
        name for name in names if name.endswith(".parquet") and posixpath.splitext(name)[0].split("-")[0] in SPLIT_WORDS
    ]
    if parquet:
        yield "huggingface", f"it holds {first_few(parquet)}"


def _two_levels(folder: Location) -> list[str]:
    names = folder.names()
    inner = [name for name in names if name.endswith("/")][:_SHOWN]
    return names + [name for part in inner for name in (folder / part.rstrip("/")).names()]
