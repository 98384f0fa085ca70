"""Reads WebDataset tars: the files of one name are a sample, its image (`.jpg`, ...) and its labels (`.json` or `.cls`).

Images stay in their tar: the uri of a sample is a range of bytes of the tar.
"""

from __future__ import annotations

import itertools
import json
import posixpath
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..errors import UserError
from ..io.byte_ranges import range_uris
from ..io.storage import Location
from ..types import SampleTable
from .containers import LABEL_FIELDS, LABELLED_IMAGES, build_tables, by_split
from .image_uris import IMAGE_SUFFIXES
from .split_names import SplitName
from .text_files import is_utf8, suggest_folder

_IMAGES = {suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES}


class _Sample(NamedTuple):
    """A sample's key, the offset and length of its image in the tar, and the content of its label files by suffix."""

    key: str
    image: tuple[int, int] | None
    labels: dict[str, bytes]


def read_webdataset(
    root: Location, *, label_names: tuple[str, ...] | None = None, label_field: str | None = None
) -> dict[SplitName, SampleTable]:
    """Read all tars of a folder: only headers and labels of local tars, the whole of remote tars.

    Args:
        root: folder of the tars (subfolders too), or one tar. The name of a tar or its folder gives the split if it begins with train, val
            (valid, validation, dev) or test. If no name does, all tars are train.
        label_names: labels in the requested order, to which numbers refer (`.cls`, or in `.json`); None: all that occur.
        label_field: the field of the `.json` with a label, a list of labels or {label: 1 or 0}; None: one of `LABEL_FIELDS`.

    Returns:
        split -> n rows in the order of tars by name and of samples in them; image_id is `<tar>/<key>`; targets in {1, 0}.

    Raises:
        UserError: if there is no tar, a tar is damaged or compressed, or a sample lacks its image or labels.
    """
    tars = [""] if root.is_file() else _tars_in(root, recursive=True)
    if not tars:
        compressed = ".tar.gz and .tgz have to be unpacked to .tar: images are read in place"
        what = "holds no .tar" if root.is_dir() else "no such folder"
        suggestion = suggest_folder(root, lambda folder: bool(_tars_in(folder)))
        raise UserError(f"{root}: {what}; give the folder of WebDataset tars ({compressed}){suggestion}")
    parts = {}
    for split, names in by_split(root, tars).items():
        read = [_read_tar(root / name if name else root, name, label_names, label_field) for name in names]
        parts[split] = pa.concat_tables(read)
    return build_tables(parts, label_names, root)


def _tars_in(folder: Location, *, recursive: bool = False) -> list[str]:
    return [name for name in folder.names(recursive=recursive, missing_ok=True) if name.endswith(".tar")]


def _read_tar(tar: Location, name: str, label_names: tuple[str, ...] | None, label_field: str | None) -> pa.Table:
    """Return the samples of a tar, of schema `LABELLED_IMAGES`; name: its path below the root, "" if it is the root."""
    prefix = (name or tar.name).removesuffix(".tar")
    ids: list[str] = []
    ranges: list[tuple[int, int]] = []
    labels: list[list[str]] = []
    for sample in _samples(tar):
        where = f"{tar}: sample {sample.key}"
        if sample.image is None:
            raise UserError(f"{where} holds no image ({', '.join(sorted(_IMAGES))}); remove it")
        ids.append(f"{prefix}/{sample.key}")
        ranges.append(sample.image)
        labels.append(_labels(sample, label_names, label_field, where))
    offsets, lengths = np.array(ranges, np.int64).reshape(-1, 2).T
    columns = {"image_id": ids, "uri": range_uris(tar, offsets, lengths), "labels": labels}
    return pa.table(columns, LABELLED_IMAGES)


def _samples(tar: Location) -> Iterator[_Sample]:
    try:
        with (
            tar.opened_input() as stream,
            # For a remote tar, one read from start to end is quicker than a request per header.
            tarfile.open(fileobj=stream, mode="r:" if tar.is_local else "r|") as archive,
        ):
            for key, members in itertools.groupby(filter(_is_visible_file, archive), _key):
                image, labels = None, {}
                for member in members:
                    archive.members = []  # type: ignore[attr-defined]  # else it keeps every header in memory
                    suffix = posixpath.basename(member.name).lower().partition(".")[2]
                    if suffix in _IMAGES:
                        image = (member.offset_data, member.size)
                    elif suffix in ("json", "cls"):
                        content = archive.extractfile(member)
                        assert content is not None, "member.isfile() is true"
                        labels[suffix] = content.read()
                yield _Sample(key, image, labels)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{tar}: not a whole, uncompressed tar ({error}); download or unpack it again") from None


def _is_visible_file(member: tarfile.TarInfo) -> bool:
    return member.isfile() and not posixpath.basename(member.name).startswith(".")


def _key(member: tarfile.TarInfo) -> str:
    """Return the path of a file up to the first dot in its name."""
    folder, name = posixpath.split(member.name)
    return posixpath.join(folder, name.partition(".")[0])


def _labels(sample: _Sample, names: tuple[str, ...] | None, label_field: str | None, where: str) -> list[str]:
    """Return the labels of a sample, each once."""
    if "json" in sample.labels:
        try:
            content = json.loads(sample.labels["json"])
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: its .json is not JSON ({error}); correct it") from None
        fields = content if isinstance(content, dict) else {}
        chosen = label_field or next((name for name in LABEL_FIELDS if name in fields), None)
        if chosen not in fields:
            wanted = label_field or ", ".join(LABEL_FIELDS)
            raise UserError(
                f"{where}: its .json has no field {wanted}, only {', '.join(map(str, fields)) or 'nothing'};"
                " name the field with data.label_column"
            )
        value = fields[chosen]
    elif "cls" in sample.labels:
        text = sample.labels["cls"].decode("utf-8", "replace").replace(",", "\n")
        words = text.split()
        if not all(word.isdecimal() for word in words):  # names may contain blanks
            words = [word for line in text.splitlines() if (word := line.strip())]
        value = [int(word) if word.isdecimal() else word for word in words]
    else:
        raise UserError(f"{where} holds no labels; put a .json with a list of labels, or a .cls, beside the image")
    if isinstance(value, dict):
        wrong = [name for name, state in value.items() if state not in (0, 1)]
        if wrong:
            raise UserError(f"{where}: label {wrong[0]!r} is {value[wrong[0]]!r}; write 1 or 0")
        value = [name for name, state in value.items() if state]
    labels = value if isinstance(value, list) else [value]
    return list(dict.fromkeys(_name(label, names, where) for label in labels))


def _name(label: Any, names: tuple[str, ...] | None, where: str) -> str:
    if isinstance(label, str) and label.strip() and is_utf8(label):
        return label.strip()
    if not isinstance(label, int) or isinstance(label, bool):
        raise UserError(f"{where}: {label!r} is not a label; write a name, or its number in data.labels")
    if names is None:
        raise UserError(
            f"{where}: label {label} is a number; name the labels in a text file (data.labels), one per line"
        )
    if not 0 <= label < len(names):
        raise UserError(f"{where}: label {label} is not one of the {len(names)} of data.labels (0 to {len(names) - 1})")
    return names[label]
