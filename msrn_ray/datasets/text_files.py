"""What the readers share: text and JSON files, messages, and where else the folder might be that was meant."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..io.storage import Location

_LEVELS_ABOVE, _FOLDERS_BELOW = 3, 50  # how far a hint looks; each folder may be a request to another machine


def read_data(place: Location, mend: str) -> bytes:
    """The bytes of a file that must be there.

    Args:
        place: the file.
        mend: what to do if there is none, for the message.

    Raises:
        UserError: if there is no such file or it cannot be read.
    """
    try:
        return place.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{place}: no such file; {mend}") from None
    except OSError as error:
        raise UserError(f"{place}: cannot be read ({' '.join(str(error).split())[:300]})") from None


def read_text(place: Location, mend: str) -> str:
    """The content of a UTF-8 file, without its byte order mark if it has one.

    Raises:
        UserError: if there is no such file (`mend` says what to do then) or it is in another encoding, with the line.
    """
    return decode_text(place, read_data(place, mend))


def decode_text(place: Location, data: bytes) -> str:
    """The text of a UTF-8 file, with or without byte order mark.

    Raises:
        UserError: for another encoding, with the line of the first byte that is not UTF-8.
    """
    mend = "save the whole file as UTF-8 (spreadsheets call it 'CSV UTF-8')"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{place}: is UTF-16; {mend}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{place}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; {mend}") from None


def read_lines(place: Location, mend: str) -> list[str]:
    """The lines of a UTF-8 file, with line ends of any system; raises as `read_text`."""
    return (
        io.StringIO(read_text(place, mend), newline=None).read().split("\n")
    )  # splitlines cuts at more than line ends


def read_label_names(place: Location, mend: str = "write one label a line") -> tuple[str, ...]:
    """The lines of a text file, in their order; empty ones are left out.

    Args:
        place: the file.
        mend: what to do if there is none, for the message.

    Raises:
        UserError: if it cannot be read, is empty, or names a label twice.
    """
    names = [name for line in read_lines(place, mend) if (name := line.strip())]
    if not names:
        raise UserError(f"{place}: is empty; write each label once, one a line")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{place}: names {twice[0]!r} twice; write each label once, one a line")
    return tuple(names)


def read_json(place: Location, mend: str) -> dict[str, Any]:
    """A JSON object; {} for JSON of another kind. `mend` ends the message where it is damaged.

    Raises:
        UserError: if it cannot be read or is not JSON.
    """
    try:
        content = json.loads(place.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{place}: damaged ({' '.join(str(error).split())[:200]}); {mend}") from None
    return content if isinstance(content, dict) else {}


def unlabelled_note(what: str, labelled: npt.NDArray[np.bool_], keep_unlabelled: bool) -> str:
    """The note on how many images there are and what became of those without a label; labelled: [n] bool."""
    num_images, num_labelled = len(labelled), np.count_nonzero(labelled)
    if keep_unlabelled:
        return f"{what}: {num_images} images, {num_images - num_labelled} without a label kept"
    return f"{what}: {num_labelled} of {num_images} images, {num_images - num_labelled} without a label dropped"


def require_unique(place: Location, what: str, values: Iterable[int | str]) -> None:
    """Refuses values that occur more than once.

    Raises:
        UserError: with their number and the first ones.
    """
    twice = [value for value, times in Counter(values).items() if times > 1]
    if twice:
        raise UserError(
            f"{place}: {len(twice)} values of {what} occur more than once ({first_few(twice)}); make them unique"
        )


def require_utf8(root: Location, names: Iterable[str]) -> None:
    """Refuses names of files that are no text; the operating system allows them.

    Raises:
        UserError: with the first ones.
    """
    unreadable = [name for name in names if not is_utf8(name)]
    if unreadable:
        raise UserError(f"{root}: {first_few(map(ascii, unreadable))}: the name is not UTF-8; rename the file")


def is_utf8(name: str) -> bool:
    """Whether it is text: names of files need not be, and JSON can write halves of characters."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_few(items: Iterable[object], limit: int = 3) -> str:
    """The first few, for a message."""
    texts = [str(item) for item in items]
    return ", ".join(texts[:limit]) + (", ..." if len(texts) > limit else "")


def hint(root: Location, holds: Callable[[Location], bool]) -> str:
    """` (did you mean ...?)` with the nearest folder below or above `root` that `holds` what is looked for; else nothing."""
    with contextlib.suppress(UserError):  # a hint is no reason for another error: what is around may be closed to us
        for place in _around(root):
            if holds(place):
                return f" (did you mean {place}?)"
    return ""


def _around(root: Location) -> Iterator[Location]:
    for name in [name for name in root.names(missing_ok=True) if name.endswith("/")][:_FOLDERS_BELOW]:
        yield root / name.rstrip("/")
    place = root
    for _ in range(_LEVELS_ABOVE):
        if place.parent == place or place.parent.is_local != root.is_local:  # the top; above a bucket there is nothing
            break
        place = place.parent
        yield place
