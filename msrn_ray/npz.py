"""Reads .npz files of plain arrays, from anybody: no pickle is loaded."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import UserError


def read_arrays(path: Path, fields: Sequence[str]) -> list[npt.NDArray[Any]]:
    """Reads the named arrays of an .npz file without unpickling anything.

    Raises:
        UserError: if the file is missing, is no .npz, lacks a field, or a field is a pickled object.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give an .npz file with {', '.join(fields)}")
    arrays = []
    try:
        with np.load(path, allow_pickle=False) as content:
            for field in fields:
                if field not in content:
                    raise UserError(f'{path}: has no "{field}"; give an .npz file with {", ".join(fields)}')
                arrays.append(content[field])
    except UserError:
        raise
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not an .npz file of plain arrays ({error}); write it with numpy.savez") from error
    return arrays
