"""Read YAML and .npz files without running code from them, check output paths, write files whole or not at all."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from ..errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path`; once the block has written it, sync it to disk and rename it to `path`.

    Readers see the old file or the whole new one, even after a crash of the machine. A block that fails leaves nothing behind.

    Raises:
        OSError: if the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def write_output(path: Path) -> Iterator[Path]:
    """Like `atomic_write`, for a file that the user names. A link stays, and the file that it points to is replaced.

    Raises:
        UserError: if the file cannot be written.
    """
    try:
        with atomic_write(path.resolve()) as partial:
            yield partial
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def read_arrays(path: Path, fields: Sequence[str]) -> list[npt.NDArray[Any]]:
    """Return the named arrays of an .npz file without unpickling anything.

    Raises:
        UserError: if the file is missing, is not an .npz, lacks a field, or a field is a pickled object.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give an .npz file with {', '.join(fields)}")
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {field: content[field] for field in fields if field in content}
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not an .npz file of plain arrays ({error}); write it with numpy.savez") from error
    for field in fields:
        if field not in arrays:
            raise UserError(f'{path}: has no "{field}"; give an .npz file with {", ".join(fields)}')
    return list(arrays.values())


def check_output(path: Path, suffixes: Sequence[str], option: str = "--out") -> None:
    """Check the suffix and the folder of an output file before the work starts; `option` names it in the error.

    Raises:
        UserError: for another suffix, or a folder that does not exist.
    """
    if path.suffix not in suffixes:
        raise UserError(f"{option} {path}: the suffix must be one of {' '.join(suffixes)}")
    if not path.resolve().parent.is_dir():
        raise UserError(f"{option} {path}: the folder {path.resolve().parent} does not exist; create it")


def read_yaml(path: Path, name: str) -> Any:
    """Return what a YAML file holds; JSON is YAML too.

    Args:
        path: the file.
        name: what to call it in errors.

    Raises:
        UserError: if it cannot be read or is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: not YAML or JSON ({' '.join(str(error).split())})") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all, see `atomic_write`."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def remove_partial_files(folder: Path) -> None:
    """Delete the files of `atomic_write` that killed processes left in a folder. No process may be writing there."""
    for path in filter(Path.is_file, folder.glob(".*.partial")):
        path.unlink(missing_ok=True)
