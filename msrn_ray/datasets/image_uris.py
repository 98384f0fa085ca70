"""Finds the images of a label file: their paths or URIs, which of them exist, and the rows of a sample table that remain."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from ..errors import UserError
from ..io.filesystems import filesystem_of
from ..io.storage import Location
from ..types import PRESENT, SampleTable
from .text_files import first_few, require_utf8

MissingImages = Literal["error", "skip"]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

_NAMES_PER_CHUNK = 65_536  # of a folder's listing


def is_image(name: str) -> bool:
    """Return whether a file is an image by its suffix."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def list_images(
    root: Location, folders: Iterable[str], *, recursive: bool = False
) -> tuple[dict[str, pa.StringArray], list[str]]:
    """Return the images of each folder that holds any, as paths relative to `root`, and notes on what was left out.

    Args:
        root: the data set.
        folders: paths relative to `root`.
        recursive: include the images in inner folders.

    Raises:
        UserError: if a folder cannot be listed, or the name of an image is not UTF-8.
    """
    images: dict[str, pa.StringArray] = {}
    notes: list[str] = []
    num_other = 0
    for folder in folders:
        files = [name for name in (root / folder).names(recursive=recursive) if not name.endswith("/")]
        paths = [f"{folder}/{name}" for name in files if is_image(name)]
        num_other += len(files) - len(paths)
        if paths:
            require_utf8(root, paths)
            images[folder] = pa.array(paths)
        else:
            notes.append(f"{folder}: no image in this folder")
    if num_other:
        notes.append(f"{root.name}: {num_other} files skipped that are not images ({', '.join(IMAGE_SUFFIXES)})")
    return images, notes


def uris_below(folder: Location, names: Sequence[str] | pa.ChunkedArray) -> pa.ChunkedArray:
    """Return `folder / name` of each name; [n] string.

    Raises:
        UserError: if a name contains "?" and `folder` is a URI, whose path a "?" ends.
    """
    column = _strings(names)
    before, after = str(folder / "\0").split("\0")  # a URI's options come after the path
    if not folder.is_local and (row := pc.index(pc.match_substring(column, "?"), True).as_py()) >= 0:
        _ = folder / column[row].as_py()  # raises UserError with the name
    return pc.binary_join_element_wise(before, column, after, "")


def absolute_uris(manifest: Location, paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the absolute path or URI of each image of a manifest.

    Args:
        manifest: the file; relative paths start from its folder.
        paths: [n] string, with forward slashes. Absolute paths and URIs stay; relative paths must stay below the folder.

    Raises:
        UserError: if a relative path contains "..", with its row.
    """
    absolute = pc.or_(pc.starts_with(paths, "/"), pc.match_substring(paths, "://"))
    row = pc.index(pc.and_not(_contains_dotdot(paths), absolute), True).as_py()
    if row >= 0:
        raise UserError(
            f"{manifest}, row {row + 1}: {paths[row].as_py()!r} may lead out of {manifest.parent}; write it without '..' and"
            " relative to that folder, or as an absolute path"
        )
    if pc.all(absolute).as_py():
        return paths
    if not pc.any(absolute).as_py():
        return uris_below(manifest.parent, paths)
    relative = pc.invert(absolute).combine_chunks()
    joined = uris_below(manifest.parent, pc.filter(paths, relative)).combine_chunks()
    return pc.replace_with_mask(paths, relative, joined)


def find_images(
    folder: Location, names: Sequence[str] | pa.ChunkedArray, label_file: Location, missing_images: MissingImages
) -> npt.NDArray[np.bool_]:
    """Return which of the images that a label file lists are in `folder`.

    Args:
        folder: where the images are.
        names: [n] paths relative to `folder`, with forward slashes.
        label_file: the file that lists the images, for messages.
        missing_images: whether missing images are an error or left out.

    Returns:
        [n] bool, False for images that are left out.

    Raises:
        UserError: if a name leads out of `folder`, images are missing or none remains.
    """
    column = _strings(names)
    outside = pc.or_(pc.starts_with(column, "/"), _contains_dotdot(pc.replace_substring(column, "\\", "/")))
    row = pc.index(outside, True).as_py()
    if row >= 0:
        raise UserError(
            f"{label_file}: the file name {column[row].as_py()!r} leads out of {folder}; make it relative to that folder"
        )
    found = _exist(folder, column)
    if not found.any() and not folder.is_dir():
        raise UserError(f"{folder}: no such folder, but {label_file} lists {len(column)} images in it; put them there")
    require_images(label_file, uris_below(folder, column), found, missing_images)
    return found


def find_local(uris: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Return [n] bool, False for absolute local paths without a file. URIs count as found, without a look at their storage."""
    local = np.asarray(pc.invert(pc.match_substring(uris, "://")).to_numpy(), bool)
    found = ~local
    found[local] = _exist(Location("/"), pc.utf8_slice_codeunits(pc.filter(uris, pa.array(local)), 1))
    return found


def require_images(
    label_file: Location, uris: pa.ChunkedArray, found: npt.NDArray[np.bool_], missing_images: MissingImages
) -> None:
    """Refuse a label file whose images are missing, unless they may be left out; found: [n] bool.

    Raises:
        UserError: with the number of missing images and the first of them.
    """
    num_missing = len(found) - np.count_nonzero(found)
    if num_missing and (missing_images == "error" or num_missing == len(found)):
        missing = uris.take(pa.array(np.flatnonzero(~found)[:4])).to_pylist()
        raise UserError(
            f"{label_file}: {num_missing} of its {len(found)} images are missing ({first_few(missing)});"
            " finish the download or unpacking, or correct the paths"
            + ("" if num_missing == len(found) else ", or leave them out with --data.missing-images skip")
        )


def select_rows(
    samples: SampleTable, name: str, keep_unlabelled: bool, found: npt.NDArray[np.bool_] | None = None
) -> SampleTable:
    """Return the remaining rows in their order, with notes that count the dropped rows.

    Args:
        samples: n rows.
        name: what the notes call them.
        keep_unlabelled: whether rows without a present label stay.
        found: [n] bool, False for missing images; None if all images exist.
    """
    labelled = (samples.targets == PRESENT).any(1)
    found = np.ones(len(samples), bool) if found is None else found
    num_found, num_labelled = np.count_nonzero(found), np.count_nonzero(labelled & found)
    if keep_unlabelled:
        note = f"{name}: {num_found} images, {num_found - num_labelled} without a label kept"
    else:
        note = f"{name}: {num_labelled} of {num_found} images, {num_found - num_labelled} without a label dropped"
    rows = np.flatnonzero(found if keep_unlabelled else found & labelled)
    return replace(samples.take(rows), notes=(*missing_notes(name, found), note))


def missing_notes(name: str, found: npt.NDArray[np.bool_]) -> tuple[str, ...]:
    """Return the note on missing images that are left out; () if all exist. found: [n] bool."""
    num_missing = len(found) - np.count_nonzero(found)
    return (f"{name}: {num_missing} of {len(found)} listed images are missing and left out",) if num_missing else ()


def _strings(names: Sequence[str] | pa.ChunkedArray) -> pa.ChunkedArray:
    return names if isinstance(names, pa.ChunkedArray) else pa.chunked_array([names], pa.string())


def _contains_dotdot(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.match_substring_regex(paths, r"(^|/)\.\.(/|$)")


def _exist(folder: Location, names: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Return [n] bool, from one listing per subfolder that `names` mention; no request per image."""
    paths = pc.binary_join_element_wise(b"", names.cast(pa.binary()), b"/")  # file names on disk need not be UTF-8
    subfolders = pc.unique(pc.list_element(pc.split_pattern(paths, b"/", max_splits=1, reverse=True), 0)).to_pylist()
    existing = pa.chunked_array(
        (
            pc.binary_join_element_wise(subfolder, chunk, b"/")
            for subfolder in subfolders
            for chunk in _list_folder(folder / subfolder[1:].decode() if subfolder else folder)
        ),
        pa.binary(),
    )
    return np.asarray(pc.is_in(paths, value_set=existing).to_numpy(), bool)


def _list_folder(folder: Location) -> Iterator[pa.Array]:
    """Yield the names in a folder in chunks; nothing if the folder does not exist."""
    filesystem, path = filesystem_of(str(folder))
    if not isinstance(filesystem, pafs.LocalFileSystem):
        yield pa.array(folder.names(missing_ok=True), pa.string()).cast(pa.binary())
        return
    try:
        with os.scandir(os.fsencode(path)) as entries:
            while names := [entry.name for entry in islice(entries, _NAMES_PER_CHUNK)]:
                yield pa.array(names, pa.binary())
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name, which no folder has
        pass  # its images are reported as missing
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); make it readable") from None
