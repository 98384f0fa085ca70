"""Finds the images that a label file names without their folder or suffix: annotation tools and competitions write `000001` for it."""

from __future__ import annotations

import posixpath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from ..io.storage import Location
from .image_uris import absolute_uris, find_local, is_image, uris_below
from .text_files import first_few, require_utf8


def locate_images(label_file: Location, names: pa.ChunkedArray) -> tuple[pa.ChunkedArray, tuple[str, ...]]:
    """Return the absolute path or URI of each image, and a note if the images were looked up by name.

    If any of the names is a path relative to the folder of the label file, an absolute path or a URI, all are taken as written. Else each
    image is looked up below that folder: the end of its path must be the name, with or without the suffix.

    Args:
        label_file: the file that names the images. Behind a URI, nothing is looked up.
        names: [n] string, with forward slashes.

    Returns:
        [n] string; a name without a file stays as written, below the folder of the label file.

    Raises:
        UserError: if a relative name contains "..", or several files have the name of an image.
    """
    uris = absolute_uris(label_file, names)
    folder = label_file.parent
    if not folder.is_local or find_local(uris).any():
        return uris, ()
    by_name = _files_by_name(folder)
    found: dict[int, str] = {}
    for row, name in enumerate(names.to_pylist()):
        candidates = [
            path
            for path in by_name.get(posixpath.basename(name), ())
            if f"/{path}".endswith(f"/{name}") or f"/{posixpath.splitext(path)[0]}".endswith(f"/{name}")
        ]
        if len(candidates) > 1:
            raise UserError(
                f"{label_file}: the image {name!r} may be {first_few(candidates, 2)}; write its path relative to {folder}"
            )
        if candidates:
            found[row] = candidates[0]
    if not found:
        return uris, ()
    mask = np.zeros(len(uris), bool)
    mask[[*found]] = True
    paths = uris_below(folder, [*found.values()]).combine_chunks()
    folders = sorted({posixpath.dirname(path) or "." for path in found.values()})
    note = f"{label_file.name}: {len(found)} images found by name in {first_few(folders)}"
    return pa.chunked_array([pc.replace_with_mask(uris.combine_chunks(), pa.array(mask), paths)]), (note,)


def _files_by_name(folder: Location) -> dict[str, list[str]]:
    """Return the images below a folder by file name, and by file name without suffix."""
    files = [name for name in folder.names(recursive=True) if not name.endswith("/") and is_image(name)]
    require_utf8(folder, files)
    by_name: dict[str, list[str]] = {}
    for path in files:
        name = posixpath.basename(path)
        for key in {name, posixpath.splitext(name)[0]}:
            by_name.setdefault(key, []).append(path)
    return by_name
