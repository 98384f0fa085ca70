"""Connects the file system behind a local path or URI: pyarrow's, or that of an installed fsspec package."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, unquote

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs

from ..errors import UserError

_WEB = ("http", "https")
_GOOGLE = ("gs", "gcs")
_S3_OPTIONS = ("region", "scheme", "endpoint_override", "anonymous")
_CONNECT_SECONDS, _REQUEST_SECONDS = 5, 20  # a bucket that does not answer is an error soon, not a hang


def filesystem_of(place: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a local path or URI, connected once per process, and the path in it.

    Raises:
        UserError: if the URI's scheme is not known or its options are wrong.
    """
    scheme, separator, rest = place.partition("://")
    if not separator:
        return _connect("file", "", ""), place
    if scheme == "file":  # a name as it is, or percent-encoded as `Path.as_uri` writes it
        return _connect("file", "", ""), rest if os.path.exists(rest) else unquote(rest)
    path, _, options = rest.partition("?")
    bucket, _, _ = path.partition("/")
    if scheme in _GOOGLE:  # a public bucket is written gs://anonymous@bucket
        path = path.removeprefix("anonymous@")
    if scheme in _WEB:  # "?" and what follows belong to the server
        return _connect(scheme, bucket, ""), place
    filesystem = _connect(scheme, bucket, options)
    if isinstance(filesystem, pafs.PyFileSystem):  # fsspec's file systems differ in what of a URI is the path
        path = filesystem.handler.fs._strip_protocol(f"{scheme}://{path}")
    return filesystem, path


@lru_cache(maxsize=32)
def _connect(scheme: str, bucket: str, options: str) -> pafs.FileSystem:
    if scheme == "file":
        return pafs.LocalFileSystem()
    if scheme in _GOOGLE and "retry_limit_seconds" not in dict(parse_qsl(options)):  # pyarrow's own limit is 15 minutes
        options = "&".join(filter(None, (options, f"retry_limit_seconds={_REQUEST_SECONDS}")))
    uri = f"{scheme}://{bucket}" + (f"?{options}" if options else "")
    with suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):  # not a scheme of pyarrow: fsspec may know it
        if scheme == "s3":
            return _connect_s3(options)
        return pafs.FileSystem.from_uri(uri)[0]
    try:
        limits = {"client_kwargs": {"timeout": _web_timeout()}} if scheme in _WEB else {}
        return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.core.url_to_fs(uri, **limits)[0]))
    except (ValueError, ImportError) as error:
        raise UserError(f"{uri}: neither pyarrow nor fsspec reads this kind of URI ({error})") from None


def _web_timeout() -> Any:
    import aiohttp  # comes with fsspec[http]

    return aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_REQUEST_SECONDS)


def _connect_s3(options: str) -> pafs.S3FileSystem:
    given = dict(parse_qsl(options))
    unknown = sorted(set(given) - set(_S3_OPTIONS))
    if unknown:
        raise UserError(f"s3 URI: unknown options {', '.join(unknown)}; allowed: {', '.join(_S3_OPTIONS)}")
    anonymous = given.pop("anonymous", "false").lower() in ("1", "true")
    return pafs.S3FileSystem(
        anonymous=anonymous, connect_timeout=_CONNECT_SECONDS, request_timeout=_REQUEST_SECONDS, **given
    )
