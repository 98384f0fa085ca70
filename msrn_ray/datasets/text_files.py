"""Reads text and JSON label files, checks names, and suggests the folder that a user may have meant."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..errors import UserError
from ..io.storage import Location

_LEVELS_ABOVE, _FOLDERS_BELOW = 3, 50  # how far to look for a folder to suggest; each folder may cost a network request


def read_data(file: Location, fix: str) -> bytes:
    """Return the bytes of a file that must exist.

    Args:
        file: where it is.
        fix: what to do if it is missing, for the message.

    Raises:
        UserError: if the file is missing or cannot be read.
    """
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; {fix}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())[:300]})") from None


def read_text(file: Location, fix: str) -> str:
    """Return the content of a UTF-8 file, without its byte order mark; raises as `read_data` and `decode_text`."""
    return decode_text(file, read_data(file, fix))


def decode_text(file: Location, data: bytes) -> str:
    """Return the text of a UTF-8 file, without its byte order mark.

    Raises:
        UserError: for another encoding, with the line of the first byte that is not UTF-8.
    """
    fix = "save the whole file as UTF-8 (spreadsheets call it 'CSV UTF-8')"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{file}: is UTF-16; {fix}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; {fix}") from None


def read_lines(file: Location, fix: str) -> list[str]:
    """Return the lines of a UTF-8 file, with the line ends of any system; raises as `read_text`."""
    text = io.StringIO(read_text(file, fix), newline=None).read()
    return text.split("\n")  # splitlines would also cut at characters that are no line ends


def read_label_names(file: Location, fix: str = "write one label per line") -> tuple[str, ...]:
    """Return the lines of a text file in their order, without the empty ones.

    Args:
        file: where it is.
        fix: what to do if it is missing, for the message.

    Raises:
        UserError: if the file cannot be read, is empty or repeats a label.
    """
    names = [name for line in read_lines(file, fix) if (name := line.strip())]
    if not names:
        raise UserError(f"{file}: is empty; write each label once, one per line")
    if repeated := _repeated(names):
        raise UserError(f"{file}: names {repeated[0]!r} more than once; write each label once, one per line")
    return tuple(names)


def read_json(file: Location, fix: str) -> dict[str, Any]:
    """Return a JSON object, or {} for JSON of another kind. `fix` ends the message about a damaged file.

    Raises:
        UserError: if the file cannot be read or is not JSON.
    """
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged ({' '.join(str(error).split())[:200]}); {fix}") from None
    return content if isinstance(content, dict) else {}


def require_unique(file: Location, field: str, values: Iterable[int | str]) -> None:
    """Refuse repeated values.

    Raises:
        UserError: with the number of repeated values and the first of them.
    """
    if repeated := _repeated(values):
        raise UserError(
            f"{file}: {len(repeated)} values of {field} occur more than once ({first_few(repeated)}); make them unique"
        )


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def require_utf8(root: Location, names: Iterable[str]) -> None:
    """Refuse file names that are not UTF-8, which the operating system allows.

    Raises:
        UserError: with the first names.
    """
    unreadable = [name for name in names if not is_utf8(name)]
    if unreadable:
        raise UserError(f"{root}: {first_few(map(ascii, unreadable))}: the name is not UTF-8; rename the file")


def is_utf8(name: str) -> bool:
    """Return whether a name can be encoded: file names may hold any bytes, and JSON can write half a surrogate pair."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_few(items: Iterable[object], limit: int = 3) -> str:
    """Return the first items as text, for a message."""
    texts = [str(item) for item in items]
    return ", ".join(texts[:limit]) + (", ..." if len(texts) > limit else "")


def suggest_folder(root: Location, holds_data: Callable[[Location], bool]) -> str:
    """Return ` (did you mean ...?)` with the nearest folder below or above `root` for which `holds_data` is true, else ""."""
    with contextlib.suppress(UserError):  # a folder near `root` that cannot be listed must not hide the first error
        for folder in _nearby_folders(root):
            if holds_data(folder):
                return f" (did you mean {folder}?)"
    return ""


def _nearby_folders(root: Location) -> Iterator[Location]:
    for name in [name for name in root.names(missing_ok=True) if name.endswith("/")][:_FOLDERS_BELOW]:
        yield root / name.rstrip("/")
    folder = root
    for _ in range(_LEVELS_ABOVE):
        if folder.parent == folder or folder.parent.is_local != root.is_local:  # the top; a bucket has no folder above
            break
        folder = folder.parent
        yield folder
