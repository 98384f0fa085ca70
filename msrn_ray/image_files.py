"""Reads the bytes of an image from wherever it lies."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import cast
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs


def read_bytes(uri: str) -> bytes:
    """The bytes of a local path or of any URI that pyarrow reads (s3://, gs://, file://).

    Raises:
        OSError: if it cannot be read.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        with open(uri, "rb") as file:
            return file.read()
    bucket, _, _ = rest.partition("/")
    if scheme == "file":
        if not os.path.exists(rest):
            rest = unquote(rest)  # a name as it is, or percent-encoded as `Path.as_uri` writes it
        bucket = ""
    try:
        with _filesystem(scheme, bucket).open_input_file(rest) as stream:
            return cast(bytes, stream.read())
    except pa.ArrowInvalid as error:  # no scheme that pyarrow knows, https for one
        raise OSError(f"{uri}: {error}") from None


@lru_cache(maxsize=32)
def _filesystem(scheme: str, bucket: str) -> pafs.FileSystem:
    """One connection a bucket and process, not one an image."""
    return pafs.FileSystem.from_uri(f"{scheme}://{bucket}" if scheme != "file" else "file:///")[0]
