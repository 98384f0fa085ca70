"""What the readers share: text files, lists of images, and where else the folder might be that was meant."""

from __future__ import annotations

import contextlib
import io
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..storage import Location

MissingImages = Literal["error", "skip"]

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
    data = read_data(place, mend)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{place}: is UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{place}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def read_lines(place: Location, mend: str) -> list[str]:
    """The lines of a UTF-8 file, with line ends of any system; raises as `read_text`."""
    return (
        io.StringIO(read_text(place, mend), newline=None).read().split("\n")
    )  # splitlines cuts at more than line ends


def find_images(
    folder: Location, names: Sequence[str], listed_in: Location, missing_images: MissingImages
) -> npt.NDArray[np.bool_]:
    """Which of the images that a label file lists are in `folder`, by one listing per folder and no look at single images.

    Args:
        folder: where the images are.
        names: [n] paths relative to `folder`, with forward slashes.
        listed_in: the label file, for the message.
        missing_images: what images are that are not there: an error, or left out.

    Returns:
        [n] bool, False for images that are left out.

    Raises:
        UserError: if a name leads out of `folder`, images are not in it, or none is left.
    """
    for name in names:
        if name.startswith("/") or ".." in name.replace("\\", "/").split("/"):
            raise UserError(
                f"{listed_in}: the file name {name!r} leads out of {folder}; make it relative to that folder"
            )
    present = {
        posixpath.join(part, name)
        for part in {posixpath.dirname(name) for name in names}
        for name in (folder / part if part else folder).names(missing_ok=True)
    }
    if not present and not folder.is_dir():
        raise UserError(f"{folder}: no such folder, but {listed_in} lists {len(names)} images in it; put them there")
    found = np.fromiter((name in present for name in names), bool, len(names))
    num_missing = len(names) - np.count_nonzero(found)
    if num_missing and (missing_images == "error" or num_missing == len(names)):
        missing = (name for name, there in zip(names, found, strict=True) if not there)
        raise UserError(
            f"{folder}: {num_missing} of the {len(names)} images listed in {listed_in} are not there "
            f"({first_few(missing)}); finish the download or unpacking"
            + ("" if num_missing == len(names) else ", or leave them out with --data.missing-images skip")
        )
    return found


def missing_notes(what: str, found: npt.NDArray[np.bool_]) -> tuple[str, ...]:
    """The note on images that are left out because they are not there; none if all are."""
    num_missing = len(found) - np.count_nonzero(found)
    return (f"{what}: {num_missing} of {len(found)} listed images are not there, left out",) if num_missing else ()


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
