"""Files of a data set, on this machine or behind a URI: the one door to file systems; no Ray.

A location is a local path or a URI that pyarrow reads (file://, s3://, gs://, hdfs://) or, failing that, one that an installed fsspec
package reads. Options of pyarrow's go into the URI (s3://bucket/folder?endpoint_override=localhost:9000&scheme=http).

A part of a file is written as a fragment behind its location, options included: `FILE#bytes=OFFSET+LENGTH` are the LENGTH bytes from
byte OFFSET on (counted from 0): an image in a shard has an address of its own, and reading it reads nothing else. Where the bytes lie
compressed in a Parquet file, `FILE#parquet=GROUP,ROW,COLUMN` is one value of a row group; reading it reads the group's column.
"""

from __future__ import annotations

import os
import posixpath
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl, unquote

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs

from ..errors import UserError


@dataclass(frozen=True)
class Location:
    """A file or folder; joins with `/`. Two locations are equal if their text is.

    Attributes:
        text: an absolute local path, or a URI.
    """

    text: str

    @classmethod
    def of(cls, place: str | Path | Location) -> Location:
        """From what a user wrote; local paths become absolute, `~` is the home folder, file:// becomes a path."""
        text = str(place)
        if text.startswith("file://"):  # decoded once and for all: a name below it must not climb out as %2e%2e
            text = filesystem_of(text)[1]
        if "://" in text:
            head, mark, options = cls(text)._split()
            return cls(head.rstrip("/") + mark + options)
        return cls(str(Path(text).expanduser().absolute()))

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, part: str) -> Location:
        head, mark, options = self._split()
        if "?" in part and not self.is_on_disk:
            raise UserError(f"{self}: the name {part!r} has a '?', which ends the path of a URI; rename it")
        return Location(posixpath.join(head, part) + mark + options)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return posixpath.basename(self._split()[0])

    @property
    def parent(self) -> Location:
        """The folder around it."""
        head, mark, options = self._split()
        return Location(posixpath.dirname(head) + mark + options)

    @property
    def is_local(self) -> bool:
        """Whether the operating system can open it."""
        return "://" not in self.text

    def is_file(self) -> bool:
        """Whether there is a file of this name."""
        return bool(self._info().type == pafs.FileType.File)

    def is_dir(self) -> bool:
        """Whether there is a folder of this name, or files under it."""
        return bool(self._info().type == pafs.FileType.Directory)

    def read_bytes(self) -> bytes:
        """The whole file.

        Raises:
            OSError: if it cannot be read.
        """
        with self.opened_input() as stream:
            return cast(bytes, stream.read())

    def read_range(self, offset: int, length: int) -> bytes:
        """`length` bytes from byte `offset` on; no others are read.

        Raises:
            OSError: if they cannot be read, or the file ends before.
        """
        if self.is_local:
            with open(self.text, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), length, offset)
        else:
            filesystem, path = self._opened()
            with _as_os_error(self):
                if isinstance(filesystem, pafs.PyFileSystem):  # its files read megabytes ahead
                    data = filesystem.handler.fs.cat_file(path, start=offset, end=offset + length)
                else:
                    with filesystem.open_input_file(path) as stream:
                        data = stream.read_at(length, offset)
        if len(data) != length:
            raise OSError(f"{self}: ends within the {length} bytes from {offset} on; it is cut off")
        return data

    def write_bytes(self, data: bytes) -> None:
        """Writes the whole file under a hidden name and renames it, so that the name stands for all of it or nothing; makes its folder.

        Raises:
            UserError: if it cannot be written.
        """
        filesystem, path = self._opened()
        folder, name = posixpath.split(path)
        partial = posixpath.join(folder, f".{name}")
        try:
            filesystem.create_dir(folder, recursive=True)
            with filesystem.open_output_stream(partial) as stream:
                stream.write(data)
            filesystem.move(partial, path)
        except (OSError, pa.ArrowException) as error:
            with suppress(OSError, pa.ArrowException):  # a full disk is not left fuller; what counts is the first error
                filesystem.delete_file(partial)
            raise UserError(f"{self}: cannot be written ({' '.join(str(error).split())[:300]})") from None

    def remove(self) -> None:
        """Takes the file away, if there is one.

        Raises:
            UserError: if that is not allowed.
        """
        if self.is_file():
            filesystem, path = self._opened()
            with self._told():
                filesystem.delete_file(path)

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of the files in this folder, with one listing; {} where there is no folder. Hidden ones are left out.

        Raises:
            UserError: if it cannot be listed.
        """
        filesystem, path = self._opened()
        with self._told():
            entries = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return {
            entry.base_name: entry.size
            for entry in entries
            if entry.type == pafs.FileType.File and not entry.base_name.startswith(".")
        }

    @contextmanager
    def opened_input(self) -> Iterator[pa.NativeFile]:
        """The file, open for reads at any place; pyarrow's readers take it.

        Raises:
            OSError: if it cannot be read.
        """
        filesystem, path = self._opened()
        with _as_os_error(self), filesystem.open_input_file(path) as stream:
            yield stream

    def names(self, *, recursive: bool = False, missing_ok: bool = False) -> list[str]:
        """Paths of the files and folders in this folder, relative to it, sorted; folders end in `/`. Hidden ones are left out.

        Args:
            recursive: with what is in inner folders.
            missing_ok: whether a folder that is not there counts as empty.

        Raises:
            UserError: if it cannot be listed.
        """
        filesystem, path = self._opened()
        if isinstance(filesystem, pafs.LocalFileSystem):
            return sorted(self._names_on_disk(path, missing_ok, recursive, frozenset()))
        with self._told():
            entries = filesystem.get_file_info(pafs.FileSelector(path, recursive=recursive, allow_not_found=missing_ok))
        start = len(path.strip("/")) + 1
        names = [
            entry.path.strip("/")[start:] + ("/" if entry.type == pafs.FileType.Directory else "") for entry in entries
        ]
        return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))

    def _names_on_disk(self, path: str, missing_ok: bool, recursive: bool, above: frozenset[str]) -> list[str]:
        """As `names`; pyarrow would look at each file of the folder, on a mounted one a round trip each.

        Links to folders are followed, but not to one of those that they lie in (`above`, real paths): that has no end.
        """
        try:
            with os.scandir(path) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
                names = [entry.name + ("/" if entry.is_dir() else "") for entry in visible]
            if not recursive:
                return names
            above |= {os.path.realpath(path)}
            for folder in [name for name in names if name.endswith("/")]:
                inner = os.path.join(path, folder)
                if os.path.realpath(inner) not in above:
                    names += [folder + name for name in self._names_on_disk(inner, False, True, above)]
            return names
        except OSError as error:
            if missing_ok and isinstance(error, (FileNotFoundError, NotADirectoryError)):
                return []
            where = f" in {path}" if above else ""
            raise UserError(f"{self}: cannot be reached ({error.strerror}{where})") from None

    @property
    def is_on_disk(self) -> bool:
        """Whether it is on this machine, as a path or a file:// URI."""
        return self.is_local or self.text.startswith("file://")

    def _split(self) -> tuple[str, str, str]:
        """Path and, after the mark, the file system's options, which only URIs of other machines have."""
        return (self.text, "", "") if self.is_on_disk else self.text.partition("?")

    def _opened(self) -> tuple[pafs.FileSystem, str]:
        return filesystem_of(self.text)

    def _info(self) -> pafs.FileInfo:
        filesystem, path = self._opened()
        with self._told():
            return filesystem.get_file_info(path)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException, *_web_errors()) as error:
            raise UserError(f"{self}: cannot be reached ({' '.join(str(error).split())[:300]})") from None


@contextmanager
def _as_os_error(place: Location) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, *_web_errors()) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise OSError(f"{place}: {error}") from None


def _web_errors() -> tuple[type[Exception], ...]:
    """What fsspec's http:// raises beside OSError, where it is in use."""
    return (sys.modules["aiohttp"].ClientError,) if "aiohttp" in sys.modules else ()


_WEB = ("http", "https")
_GOOGLE = ("gs", "gcs")
_S3_OPTIONS = ("region", "scheme", "endpoint_override", "anonymous")
_CONNECT_SECONDS, _REQUEST_SECONDS = 5, 20  # a bucket that does not answer is an error soon, not a hang


def filesystem_of(place: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a local path or URI, connected once a process, and the path in it.

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
    if scheme in _WEB:  # "?" and what follows is the server's
        return _connect(scheme, bucket, ""), place
    filesystem = _connect(scheme, bucket, options)
    if isinstance(filesystem, pafs.PyFileSystem):  # each has its own idea of what of a URI is the path
        path = filesystem.handler.fs._strip_protocol(f"{scheme}://{path}")
    return filesystem, path


@lru_cache(maxsize=32)
def _connect(scheme: str, bucket: str, options: str) -> pafs.FileSystem:
    if scheme == "file":
        return pafs.LocalFileSystem()
    if scheme in _GOOGLE and "retry_limit_seconds" not in dict(parse_qsl(options)):  # pyarrow's own limit is 15 minutes
        options = "&".join(filter(None, (options, f"retry_limit_seconds={_REQUEST_SECONDS}")))
    uri = f"{scheme}://{bucket}" + (f"?{options}" if options else "")
    try:
        if scheme == "s3":
            return _connect_s3(options)
        return pafs.FileSystem.from_uri(uri)[0]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # not one of pyarrow's own: fsspec may know it
        pass
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
