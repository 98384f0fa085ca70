"""Reads the bytes of an image from wherever it lies."""

from __future__ import annotations

from functools import lru_cache
from typing import cast

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
    with _filesystem(scheme, bucket).open_input_file(rest) as stream:
        return cast(bytes, stream.read())


@lru_cache(maxsize=32)
def _filesystem(scheme: str, bucket: str) -> pafs.FileSystem:
    """One connection a bucket and process, not one an image."""
    return pafs.FileSystem.from_uri(f"{scheme}://{bucket}" if scheme != "file" else "file:///")[0]
