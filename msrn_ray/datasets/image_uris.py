"""Where a list's images are: names relative to a folder become paths or URIs, and are looked for with one listing a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from ..errors import UserError
from ..io.storage import Location, filesystem_of
from .text_files import first_few

MissingImages = Literal["error", "skip"]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

_LISTED_AT_ONCE = 65_536


def is_image(name: str) -> bool:
    """Whether a file is an image by its suffix."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def uris_below(folder: Location, names: Sequence[str] | pa.ChunkedArray) -> pa.ChunkedArray:
    """`folder / name` of each name; [n] string.

    Raises:
        UserError: if a name has a "?" in it where that ends the path of a URI.
    """
    column = _strings(names)
    before, after = str(folder / "\0").split("\0")  # a URI's options come after the path
    if not folder.is_on_disk and (row := pc.index(pc.match_substring(column, "?"), True).as_py()) >= 0:
        _ = folder / column[row].as_py()  # refuses it
    return pc.binary_join_element_wise(before, column, after, "")


def absolute_uris(place: Location, paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """What each image of a manifest can be read from.

    Args:
        place: the manifest, whose folder relative paths start from.
        paths: [n] string, with forward slashes: absolute paths and URIs stay, others must stay below the folder.

    Raises:
        UserError: if a relative path has ".." in it, with its row.
    """
    absolute = pc.or_(pc.starts_with(paths, "/"), pc.match_substring(paths, "://"))
    row = pc.index(pc.and_not(_climbs(paths), absolute), True).as_py()
    if row >= 0:
        raise UserError(
            f"{place}, row {row + 1}: {paths[row].as_py()!r} may lead out of {place.parent}; write it without '..' and"
            " relative to that folder, or as an absolute path"
        )
    if pc.all(absolute).as_py():
        return paths
    if not pc.any(absolute).as_py():
        return uris_below(place.parent, paths)
    relative = pc.invert(absolute).combine_chunks()
    return pc.replace_with_mask(paths, relative, uris_below(place.parent, pc.filter(paths, relative)).combine_chunks())


def find_images(
    folder: Location, names: Sequence[str] | pa.ChunkedArray, listed_in: Location, missing_images: MissingImages
) -> npt.NDArray[np.bool_]:
    """Which of the images that a label file lists are in `folder`.

    Args:
        folder: where the images are.
        names: [n] paths relative to `folder`, with forward slashes.
        listed_in: the label file, for the message.
        missing_images: what images are that are not there: an error, or left out.

    Returns:
        [n] bool, False for images that are left out.

    Raises:
        UserError: if a name leads out of `folder`, images are not in it, or none is left.
    """
    column = _strings(names)
    outside = pc.or_(pc.starts_with(column, "/"), _climbs(pc.replace_substring(column, "\\", "/")))
    row = pc.index(outside, True).as_py()
    if row >= 0:
        raise UserError(
            f"{listed_in}: the file name {column[row].as_py()!r} leads out of {folder}; make it relative to that folder"
        )
    found = _are_there(folder, column)
    if not found.any() and not folder.is_dir():
        raise UserError(f"{folder}: no such folder, but {listed_in} lists {len(column)} images in it; put them there")
    require_images(listed_in, uris_below(folder, column), found, missing_images)
    return found


def find_local(uris: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """[n] bool, False for absolute local paths where there is nothing; URIs are not looked for."""
    local = np.asarray(pc.invert(pc.match_substring(uris, "://")).to_numpy(), bool)
    found = ~local
    found[local] = _are_there(Location("/"), pc.utf8_slice_codeunits(pc.filter(uris, pa.array(local)), 1))
    return found


def require_images(
    listed_in: Location, uris: pa.ChunkedArray, found: npt.NDArray[np.bool_], missing_images: MissingImages
) -> None:
    """Refuses a list whose images are not there, unless they may be left out; found: [n] bool.

    Raises:
        UserError: with their number and the first ones.
    """
    num_missing = len(found) - np.count_nonzero(found)
    if num_missing and (missing_images == "error" or num_missing == len(found)):
        missing = uris.take(pa.array(np.flatnonzero(~found)[:4])).to_pylist()
        raise UserError(
            f"{listed_in}: {num_missing} of its {len(found)} images are not there ({first_few(missing)});"
            " finish the download or unpacking, or correct the paths"
            + ("" if num_missing == len(found) else ", or leave them out with --data.missing-images skip")
        )


def missing_notes(what: str, found: npt.NDArray[np.bool_]) -> tuple[str, ...]:
    """The note on images that are left out because they are not there; none if all are."""
    num_missing = len(found) - np.count_nonzero(found)
    return (f"{what}: {num_missing} of {len(found)} listed images are not there, left out",) if num_missing else ()


def _strings(names: Sequence[str] | pa.ChunkedArray) -> pa.ChunkedArray:
    return names if isinstance(names, pa.ChunkedArray) else pa.chunked_array([names], pa.string())


def _climbs(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.match_substring_regex(paths, r"(^|/)\.\.(/|$)")


def _are_there(folder: Location, names: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """[n] bool; one listing for each inner folder that is named, no look at single images."""
    paths = pc.binary_join_element_wise(b"", names.cast(pa.binary()), b"/")  # names on disk need not be UTF-8
    inner = pc.unique(pc.list_element(pc.split_pattern(paths, b"/", max_splits=1, reverse=True), 0)).to_pylist()
    there = pa.chunked_array(
        (
            pc.binary_join_element_wise(part, listed, b"/")
            for part in inner
            for listed in _list_folder(folder / part[1:].decode() if part else folder)
        ),
        pa.binary(),
    )
    return np.asarray(pc.is_in(paths, value_set=there).to_numpy(), bool)


def _list_folder(folder: Location) -> Iterator[pa.Array]:
    """The names in a folder, some at a time; nothing where there is none."""
    filesystem, path = filesystem_of(str(folder))
    if not isinstance(filesystem, pafs.LocalFileSystem):
        yield pa.array(folder.names(missing_ok=True), pa.string()).cast(pa.binary())
        return
    try:
        with os.scandir(os.fsencode(path)) as entries:
            while names := [entry.name for entry in islice(entries, _LISTED_AT_ONCE)]:
                yield pa.array(names, pa.binary())
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name, which no folder has
        pass  # shows up as missing images
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); make it readable") from None
