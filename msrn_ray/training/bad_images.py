"""Images that could not be read or decoded, collected per rank and gathered over all ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

from . import distributed

RECALLED = "could not be decoded before the interruption"  # why a row is unreadable, until it is met again


@dataclass(frozen=True)
class BadImage:
    """An image that could not be read or decoded."""

    row: int
    uri: str
    reason: str


@dataclass
class BadImages:
    """The bad images that a reader met, each row once.

    Attributes:
        seen: the first report of each row; the same file is met again in each epoch.
        in_epoch: rows met since `begin_epoch`.
    """

    seen: dict[int, BadImage] = field(default_factory=dict)
    in_epoch: set[int] = field(default_factory=set)

    def begin_epoch(self) -> None:
        """Forgets which rows were met in the epoch before."""
        self.in_epoch.clear()

    def add(self, image: BadImage) -> None:
        """Notes a row that is met."""
        if image.row not in self.seen or self.seen[image.row].reason == RECALLED:
            self.seen[image.row] = image
        self.in_epoch.add(image.row)

    def gather(self) -> dict[int, BadImage]:
        """Those of all ranks by row, on every rank."""
        return {image.row: image for part in distributed.all_gather(self.seen) for image in part.values()}

    def gather_epoch(self) -> set[int]:
        """Rows that any rank met in this epoch, on every rank."""
        return set().union(*distributed.all_gather(self.in_epoch))
