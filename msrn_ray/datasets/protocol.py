"""Which images are train, val and test: the protocol."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from ..config import ExperimentConfig
from ..errors import UserError
from ..io.byte_ranges import in_row_group
from ..types import SampleTable
from .registry import read_published
from .stratify import stratified_split

_BLOCK = 65_536  # image ids hashed at once


@dataclass(frozen=True)
class Splits:
    """The three parts of a data set under a protocol.

    Attributes:
        train: what is learnt from, and what the label graph is counted on.
        val: what the best epoch is chosen on.
        test: scored once at the end; None where val is the published test split (protocol `paper`) or nothing is held out.
        notes: lines for the user.
    """

    train: SampleTable
    val: SampleTable
    test: SampleTable | None
    notes: tuple[str, ...]

    def named(self, split: str) -> SampleTable:
        """`train`, `val` or `test`.

        Raises:
            UserError: for `test` where there is none.
        """
        table = {"train": self.train, "val": self.val, "test": self.test}[split]
        if table is None:
            raise UserError(
                "there is no test split (under protocol=paper val is the published test split, and own images may have none);"
                " evaluate val"
            )
        return table


def load_splits(config: ExperimentConfig) -> Splits:
    """Reads the data set and applies the protocol.

    `honest`: val is the published val, else `data.val_fraction` of train, stratified by label and seeded; test is what is held out, if
    anything is. `paper`: val is what is held out, and nothing else is scored.

    Raises:
        UserError: for anything wrong with the data set, naming file and mend.
    """
    published = read_published(config.data)
    train, held_out = published.train, published.held_out
    notes = [note for table in (train, published.val, held_out) if table is not None for note in table.notes]
    if held_out is None:
        if config.protocol == "paper":
            raise UserError(f"{train.source}: there is no test split, which protocol=paper scores; use protocol=honest")
        notes.append("there is no test split: the score on val, which also chooses the best epoch, is the only one")
    if any(in_row_group(uri) for uri in train.table["uri"][:1].to_pylist()):
        notes.append(
            "images lie in row groups of Parquet files: slow to train from in random order; `msrn prepare` them first"
        )
    if held_out is not None and config.protocol == "paper":
        notes.append(
            f"protocol paper: the best epoch is chosen on the test split ({held_out.source}), as the papers do"
        )
        splits = Splits(train, held_out, None, tuple(notes))
    elif published.val is not None:
        splits = Splits(train, published.val, held_out, tuple(notes))
    else:
        rest, part = stratified_split(train.targets, config.data.val_fraction, config.data.split_seed)
        if not len(part):
            raise UserError(
                f"{train.source}: data.val_fraction={config.data.val_fraction} of its {len(train)} train images is none;"
                " add images, raise data.val_fraction, or name images of a split val"
            )
        notes.append(
            f"protocol honest: {len(part)} of {len(train)} train images are val (data.val_fraction={config.data.val_fraction})"
            + (f", {held_out.source} is test" if held_out is not None else "")
        )
        splits = Splits(train.take(rest), train.take(part), held_out, tuple(notes))
    for name, table in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
        if table is not None and not (table.targets == 1).any():
            raise UserError(f"{name} split ({table.source}): no image has a label, nothing to learn or to score")
    return splits


def fingerprint(*tables: SampleTable) -> str:
    """sha256 of label names, image ids and targets; where the files lie makes no difference."""
    digest = hashlib.sha256()
    for table in tables:
        digest.update("\n".join(table.label_names).encode())
        for start in range(0, len(table), _BLOCK):
            ids = table.table["image_id"].slice(start, _BLOCK).combine_chunks()
            joined = pc.binary_join(pa.ListArray.from_arrays([0, len(ids)], ids), "\n")[0]
            digest.update(b"\n" * bool(start))
            digest.update(joined.as_buffer())
        digest.update(table.targets.data)
    return digest.hexdigest()
