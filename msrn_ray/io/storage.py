"""Files and folders of a data set, on this machine or behind a URI.

A location is a local path, a URI that pyarrow reads (file://, s3://, gs://, hdfs://), or a URI that an installed fsspec package reads.
Options of pyarrow go into the URI (s3://bucket/folder?endpoint_override=localhost:9000&scheme=http).
"""

from __future__ import annotations

import os
import posixpath
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.fs as pafs

from ..errors import UserError
from .filesystems import filesystem_of


@dataclass(frozen=True)
class Location:
    """A file or folder; joins with `/`. Two locations are equal if their text is.

    Attributes:
        text: an absolute local path, or a URI.
    """

    text: str

    @classmethod
    def of(cls, place: str | Path | Location) -> Location:
        """Return the location of what a user wrote; local paths become absolute, `~` is the home folder, file:// becomes a path."""
        text = str(place)
        if text.startswith("file://"):  # decoded only here: a name below it must not climb out as %2e%2e
            text = filesystem_of(text)[1]
        if "://" in text:
            head, mark, options = cls(text)._split()
            return cls(head.rstrip("/") + mark + options)
        return cls(str(Path(text).expanduser().absolute()))

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, part: str) -> Location:
        head, mark, options = self._split()
        if "?" in part and not self.is_local:
            raise UserError(f"{self}: the name {part!r} has a '?', which ends the path of a URI; rename it")
        return Location(posixpath.join(head, part) + mark + options)

    @property
    def name(self) -> str:
        """Return the last part of the path."""
        return posixpath.basename(self._split()[0])

    @property
    def parent(self) -> Location:
        """Return the folder that holds it."""
        head, mark, options = self._split()
        return Location(posixpath.dirname(head) + mark + options)

    @property
    def is_local(self) -> bool:
        """Return whether the operating system can open it."""
        return "://" not in self.text

    def is_file(self) -> bool:
        """Return whether a file of this name exists."""
        return bool(self._info().type == pafs.FileType.File)

    def is_dir(self) -> bool:
        """Return whether a folder of this name exists, or files under it."""
        return bool(self._info().type == pafs.FileType.Directory)

    def read_bytes(self) -> bytes:
        """Return the whole file.

        Raises:
            OSError: if it cannot be read.
        """
        with self.opened_input() as stream:
            return cast(bytes, stream.read())

    def read_range(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from byte `offset` on, and read no others.

        Raises:
            OSError: if they cannot be read, or the file ends before them.
        """
        if self.is_local:
            with open(self.text, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), length, offset)
        else:
            filesystem, path = filesystem_of(self.text)
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
        """Write the file under a hidden name and rename it, so that readers see all of it or nothing. Make its folder if needed.

        Raises:
            UserError: if it cannot be written.
        """
        filesystem, path = filesystem_of(self.text)
        folder, name = posixpath.split(path)
        partial = posixpath.join(folder, f".{name}")
        try:
            filesystem.create_dir(folder, recursive=True)
            with filesystem.open_output_stream(partial) as stream:
                stream.write(data)
            filesystem.move(partial, path)
        except (OSError, pa.ArrowException) as error:
            # leave a full disk no fuller; the first error is the one to report
            with suppress(OSError, pa.ArrowException):
                filesystem.delete_file(partial)
            raise UserError(f"{self}: cannot be written ({' '.join(str(error).split())[:300]})") from None

    def remove(self) -> None:
        """Remove the file if it exists.

        Raises:
            UserError: if it cannot be removed.
        """
        if self.is_file():
            filesystem, path = filesystem_of(self.text)
            with _as_user_error(self):
                filesystem.delete_file(path)

    def sizes(self) -> dict[str, int]:
        """Return name -> bytes of the files in this folder, from one listing; {} if it does not exist. Hidden files are left out.

        Raises:
            UserError: if it cannot be listed.
        """
        filesystem, path = filesystem_of(self.text)
        with _as_user_error(self):
            entries = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return {
            entry.base_name: entry.size
            for entry in entries
            if entry.type == pafs.FileType.File and not entry.base_name.startswith(".")
        }

    @contextmanager
    def opened_input(self) -> Iterator[pa.NativeFile]:
        """Open the file for reads at any place, as pyarrow's readers take it.

        Raises:
            OSError: if it cannot be read.
        """
        filesystem, path = filesystem_of(self.text)
        with _as_os_error(self), filesystem.open_input_file(path) as stream:
            yield stream

    def names(self, *, recursive: bool = False, missing_ok: bool = False) -> list[str]:
        """Return the files and folders in this folder, relative to it, sorted. Folders end in `/`. Hidden names are left out.

        Args:
            recursive: include what is in inner folders.
            missing_ok: whether a folder that does not exist counts as empty.

        Raises:
            UserError: if it cannot be listed.
        """
        filesystem, path = filesystem_of(self.text)
        if isinstance(filesystem, pafs.LocalFileSystem):
            return sorted(self._names_on_disk(path, missing_ok, recursive, frozenset()))
        with _as_user_error(self):
            entries = filesystem.get_file_info(pafs.FileSelector(path, recursive=recursive, allow_not_found=missing_ok))
        start = len(path.strip("/")) + 1
        names = [
            entry.path.strip("/")[start:] + ("/" if entry.type == pafs.FileType.Directory else "") for entry in entries
        ]
        return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))

    def _names_on_disk(self, path: str, missing_ok: bool, recursive: bool, above: frozenset[str]) -> list[str]:
        """Like `names`. pyarrow would look at each file, on a mounted folder a round trip per file.

        Follows links to folders, but not to a folder that holds the link (`above`, real paths): that would never end.
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

    def _split(self) -> tuple[str, str, str]:
        """Return path, mark and the file system's options, which only URIs of other machines have."""
        return (self.text, "", "") if self.is_local else self.text.partition("?")

    def _info(self) -> pafs.FileInfo:
        filesystem, path = filesystem_of(self.text)
        with _as_user_error(self):
            return filesystem.get_file_info(path)


@contextmanager
def _as_user_error(place: Location) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException, *_web_errors()) as error:
        raise UserError(f"{place}: cannot be reached ({' '.join(str(error).split())[:300]})") from None


@contextmanager
def _as_os_error(place: Location) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, *_web_errors()) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise OSError(f"{place}: {error}") from None


def _web_errors() -> tuple[type[Exception], ...]:
    """Return what fsspec's http:// raises besides OSError, if it is in use."""
    return (sys.modules["aiohttp"].ClientError,) if "aiohttp" in sys.modules else ()
