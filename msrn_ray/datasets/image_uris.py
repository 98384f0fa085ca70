"""Where a list's images are: paths relative to a folder become paths or URIs, and local ones are looked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from ..storage import Location

_LISTED_AT_ONCE = 65_536


def absolute_uris(place: Location, paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """What each image can be read from.

    Args:
        place: the list, whose folder relative paths start from.
        paths: [n] string, with forward slashes: absolute paths and URIs stay, others must stay below the folder.

    Raises:
        UserError: if a relative path has ".." in it, with its row.
    """
    absolute = pc.or_(pc.starts_with(paths, "/"), pc.match_substring(paths, "://"))
    climbing = pc.and_not(pc.match_substring_regex(paths, r"(^|/)\.\.(/|$)"), absolute)
    if pc.any(climbing).as_py():
        row = pc.index(climbing, True).as_py()
        raise UserError(
            f"{place}, row {row + 1}: {paths[row].as_py()!r} may lead out of {place.parent}; write it without '..' and"
            " relative to that folder, or as an absolute path"
        )
    if pc.all(absolute).as_py():
        return paths
    before, after = str(place.parent / "\0").split("\0")  # a URI's options come after the path
    below = pc.binary_join_element_wise(before, paths, after, "")
    return pc.if_else(absolute, paths, below) if pc.any(absolute).as_py() else below


def find_local(uris: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """[n] bool, False for local paths where there is nothing; URIs are not looked at. One listing a folder, no stat an image."""
    remote = pc.match_substring(uris, "://")
    paths = uris.cast(pa.binary())  # names on disk need not be UTF-8
    parts = pc.split_pattern(pc.filter(paths, pc.invert(remote)), b"/", max_splits=1, reverse=True)
    folders = pc.unique(pc.list_element(parts, 0)).to_pylist()
    names = pa.chunked_array((listing for folder in folders for listing in _list_folder(folder)), pa.binary())
    return np.asarray(pc.or_(remote, pc.is_in(paths, value_set=names)).to_numpy(), bool)


def _list_folder(folder: bytes) -> Iterator[pa.Array]:
    try:
        with os.scandir(folder or b"/") as entries:
            while names := [entry.name for entry in islice(entries, _LISTED_AT_ONCE)]:
                yield pc.binary_join_element_wise(folder, pa.array(names), b"/")
    except (FileNotFoundError, NotADirectoryError):
        pass  # shows up as missing images
    except OSError as error:
        raise UserError(f"{os.fsdecode(folder)}: cannot be listed ({error.strerror}); make it readable") from None
