"""Addresses of parts of files: an image inside a shard, a tar, an Arrow file or a Parquet row group.

An address is a location, its options included, with a fragment behind it. Reading it reads only the part it names:

- `FILE#bytes=OFFSET+LENGTH`: LENGTH bytes from byte OFFSET on, counted from 0.
- `FILE#parquet=GROUP,ROW,COLUMN`: a value that is compressed in a Parquet row group; reading it reads the column of that group.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import UserError
from .storage import Location

_Numbers: TypeAlias = Sequence[int] | npt.NDArray[np.int64] | pa.ChunkedArray
_PART = re.compile(
    r"#(?:bytes=(?P<offset>\d+)\+(?P<length>\d+)|parquet=(?P<group>\d+),(?P<row>\d+),(?P<column>[^#]+))$"
)


def range_uris(files: Location | pa.ChunkedArray, offsets: _Numbers, lengths: _Numbers) -> pa.StringArray:
    """Return the addresses of parts of files, for `read_bytes`.

    Args:
        files: one file that holds all parts, or [n] locations.
        offsets: [n] first byte of each part, counted from 0.
        lengths: [n] number of bytes of each part.

    Returns:
        [n] string; chunked if an argument is.
    """
    places = str(files) if isinstance(files, Location) else files
    starts, sizes = (
        (numbers if isinstance(numbers, pa.ChunkedArray) else pa.array(numbers, pa.int64())).cast(pa.string())
        for numbers in (offsets, lengths)
    )
    return pc.binary_join_element_wise(places, pc.binary_join_element_wise(starts, sizes, "+"), "#bytes=")


def parquet_uris(file: Location, group: int, num_rows: int, column: str) -> pa.StringArray:
    """Return the addresses of all values of a binary column in a row group, [num_rows] string; `column` is dotted if nested."""
    rows = pa.array(np.arange(num_rows)).cast(pa.string())
    return pc.binary_join_element_wise(f"{file}#parquet={group}", rows, column, ",")


def in_row_group(uri: str) -> bool:
    """Return whether the address is a value in a Parquet file; reading it costs its whole row group."""
    part = _PART.search(uri)
    return part is not None and part["column"] is not None


def read_bytes(uri: str) -> bytes:
    """Return the bytes of a local path, a URI or a part of a file (see above).

    Raises:
        OSError: if it cannot be read, for any reason.
    """
    part = _PART.search(uri)
    if part is None and "://" not in uri:  # quicker than through a Location, for millions of images
        with open(uri, "rb", opener=_open_regular) as file:
            return file.read()
    try:
        if part is None:
            return Location(uri).read_bytes()
        place = uri[: part.start()]
        if part["column"] is None:
            return Location(place).read_range(int(part["offset"]), int(part["length"]))
        value = _column(place, int(part["group"]), part["column"])[int(part["row"])].as_py()
        if value is None:
            raise OSError(f"{uri}: holds no bytes")
        return cast(bytes, value)
    except UserError as error:
        raise OSError(str(error)) from None


def _open_regular(path: str, flags: int) -> int:
    """Open a file without waiting, as the opener of `open`; reading a pipe or a device could wait forever, so they raise OSError."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # `open` itself refuses a folder
        os.close(descriptor)
        raise OSError(f"{path}: a pipe or device and no regular file")
    return descriptor


@lru_cache(maxsize=2)  # preparing reads rows in order, so it decompresses each group once
def _column(place: str, group: int, column: str) -> pa.ChunkedArray:
    with Location(place).opened_input() as stream:
        table = pq.ParquetFile(stream).read_row_group(group, columns=[column])
    while table.column_names != [column]:  # a nested column comes inside its struct
        table = table.flatten()
    return table[column]
