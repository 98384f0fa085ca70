"""Finds the images that a label file names without their folder or suffix: annotation tools and competitions write `000001` for it."""

from __future__ import annotations

import posixpath
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from ..io.storage import Location
from .image_uris import absolute_uris, find_local, is_image, uris_below
from .text_files import first_few, require_utf8


def locate_images(label_file: Location, names: pa.ChunkedArray) -> tuple[pa.ChunkedArray, tuple[str, ...]]:
    """Return the absolute path or URI of each image, and a note if the images were looked up by name.

    If all names are paths relative to the folder of the label file, absolute paths or URIs, they are taken as written. Otherwise each image
    is looked up below that folder: first by its file name, then by its file name without suffix.

    Args:
        label_file: the file that names the images.
        names: [n] string, with forward slashes.

    Returns:
        [n] string; a name without a file stays as written, below the folder of the label file.

    Raises:
        UserError: if a relative name contains "..", or several files have the name of an image.
    """
    uris = absolute_uris(label_file, names)
    folder = label_file.parent
    missing = ~find_local(uris) if folder.is_local else np.zeros(len(uris), bool)
    if not missing.any():
        return uris, ()
    files = [name for name in folder.names(recursive=True) if not name.endswith("/") and is_image(name)]
    require_utf8(folder, files)
    by_name = _group(files, posixpath.basename)
    by_stem = _group(files, _stem)
    found, rows = [], []
    for row in np.flatnonzero(missing).tolist():
        name = names[row].as_py()
        candidates = by_name.get(posixpath.basename(name)) or by_stem.get(posixpath.basename(name)) or []
        if len(candidates) > 1:
            candidates = [path for path in candidates if f"/{path}".endswith(f"/{name.lstrip('/')}")] or candidates
        if len(candidates) > 1:
            raise UserError(
                f"{label_file}: the image {name!r} may be {first_few(candidates, 2)}; write its path relative to {folder}"
            )
        if candidates:
            found.append(candidates[0])
            rows.append(row)
    if not rows:
        return uris, ()
    mask = np.zeros(len(uris), bool)
    mask[rows] = True
    uris = pc.replace_with_mask(uris.combine_chunks(), pa.array(mask), uris_below(folder, found).combine_chunks())
    folders = sorted({posixpath.dirname(path) or "." for path in found})
    return pa.chunked_array([uris]), (f"{label_file.name}: {len(rows)} images found by name in {first_few(folders)}",)


def _stem(path: str) -> str:
    return posixpath.splitext(posixpath.basename(path))[0]


def _group(paths: list[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(key(path), []).append(path)
    return groups
