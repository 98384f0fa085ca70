"""Reads WebDataset tars: the files of one name are a sample, its image (`.jpg`, ...) and its labels (`.json`, ...).

Images stay in their tar: the uri of a sample is a range of bytes of the tar.
"""

from __future__ import annotations

import itertools
import posixpath
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ..errors import UserError
from ..io.byte_ranges import range_uris
from ..io.storage import Location
from ..types import SampleTable
from .containers import LABELLED_IMAGES, build_tables, by_split
from .image_uris import IMAGE_SUFFIXES
from .split_names import SplitName
from .text_files import suggest_folder
from .webdataset_labels import LabelValue, is_label_file, name_labels, parse_labels

_IMAGES = {suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES}


class _Sample(NamedTuple):
    """A sample's key, the offset and length of its image in the tar, and the content of its label files by suffix."""

    key: str
    image: tuple[int, int] | None
    labels: dict[str, bytes]
    other_suffix: str | None  # of an image whose name has further dots, which is not the sample's


def read_webdataset(
    root: Location,
    *,
    label_names: tuple[str, ...] | None = None,
    label_field: str | None = None,
    label_separator: str | None = None,
) -> dict[SplitName, SampleTable]:
    """Read all tars of a folder: only headers and labels of local tars, the whole of remote tars.

    Args:
        root: folder of the tars (subfolders too), or one tar. The name of a tar or its folder gives the split if it begins with train, val
            (valid, validation, dev) or test. If no name does, all tars are train.
        label_names: labels in the requested order, to which numbers and flags by position refer; None: all that occur.
        label_field: the field of the `.json` with a label, a list of labels or {label: 1 or 0}; None: one of `LABEL_FIELDS`, or the
            `.json` is such a list itself.
        label_separator: between the labels in a text (`.txt`, `.json`); None: the only usual one that occurs.

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
    ids: list[str] = []
    uris: list[pa.Array] = []
    where: list[str] = []
    values: list[LabelValue] = []
    ends: dict[SplitName, int] = {}
    for split, names in by_split(root, tars).items():
        for name in names:
            tar = root / name if name else root
            prefix = (name or tar.name).removesuffix(".tar")
            ranges: list[tuple[int, int]] = []
            for sample in _samples(tar):
                ranges.append(_image_of(sample, f"{tar}: sample {sample.key}"))
                ids.append(f"{prefix}/{sample.key}")
                where.append(f"{tar}: sample {sample.key}")
                values.append(parse_labels(sample.labels, label_field, label_names, where[-1]))
            offsets, lengths = np.array(ranges, np.int64).reshape(-1, 2).T
            uris.append(range_uris(tar, offsets, lengths))
        ends[split] = len(ids)
    # Whether numbers are flags, and what separates labels, is decided over all samples of all splits.
    labels, notes = name_labels(root, where, values, label_names, label_separator)
    rows = pa.table({"image_id": ids, "uri": pa.chunked_array(uris, pa.string()), "labels": labels}, LABELLED_IMAGES)
    parts = {}
    first = 0
    for split, end in ends.items():
        parts[split] = rows.slice(first, end - first)
        first = end
    return build_tables(parts, label_names, root, notes)


def _tars_in(folder: Location, *, recursive: bool = False) -> list[str]:
    return [name for name in folder.names(recursive=recursive, missing_ok=True) if name.endswith(".tar")]


def _image_of(sample: _Sample, where: str) -> tuple[int, int]:
    if sample.image is not None:
        return sample.image
    dots = (
        f" Its files end in .{sample.other_suffix}: a sample's key ends at the first dot of the file's name, so write the names"
        " without other dots"
        if sample.other_suffix
        else ""
    )
    raise UserError(f"{where} holds no image ({', '.join(sorted(_IMAGES))}); remove it.{dots}")


def _samples(tar: Location) -> Iterator[_Sample]:
    try:
        with (
            tar.opened_input() as stream,
            # For a remote tar, one read from start to end is quicker than a request per header.
            tarfile.open(fileobj=stream, mode="r:" if tar.is_local else "r|") as archive,
        ):
            for key, members in itertools.groupby(filter(_is_visible_file, archive), _key):
                image, labels, other = None, {}, None
                for member in members:
                    archive.members = []  # type: ignore[attr-defined]  # else it keeps every header in memory
                    suffix = posixpath.basename(member.name).lower().partition(".")[2]
                    if suffix in _IMAGES:
                        image = (member.offset_data, member.size)
                    elif suffix.rpartition(".")[2] in _IMAGES:
                        other = suffix
                    elif is_label_file(suffix):
                        content = archive.extractfile(member)
                        assert content is not None, "member.isfile() is true"
                        labels[suffix] = content.read()
                yield _Sample(key, image, labels, other)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{tar}: not a whole, uncompressed tar ({error}); download or unpack it again") from None


def _is_visible_file(member: tarfile.TarInfo) -> bool:
    return member.isfile() and not posixpath.basename(member.name).startswith(".")


def _key(member: tarfile.TarInfo) -> str:
    """Return the path of a file up to the first dot in its name."""
    folder, name = posixpath.split(member.name)
    return posixpath.join(folder, name.partition(".")[0])
