"""The protocol: which images are train, val and test."""

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
from .stratify import split_off

_IDS_PER_BLOCK = 65_536  # hashed at once


@dataclass(frozen=True)
class Splits:
    """The splits of a data set under a protocol.

    Attributes:
        train: the images to train on; the label graph is counted on them.
        val: the images that choose the best epoch.
        test: scored once at the end; None if val is the published test split (protocol `paper`) or no images are held out.
        notes: lines for the user.
    """

    train: SampleTable
    val: SampleTable
    test: SampleTable | None
    notes: tuple[str, ...]

    @property
    def tables(self) -> dict[str, SampleTable]:
        """The splits that exist, by name."""
        tables = {"train": self.train, "val": self.val, "test": self.test}
        return {name: table for name, table in tables.items() if table is not None}

    def named(self, split: str) -> SampleTable:
        """Return `train`, `val` or `test`.

        Raises:
            UserError: for a missing `test`.
        """
        if split == "test" and self.test is None:
            raise UserError(
                "there is no test split (under protocol=paper val is the published test split, and custom images may have none);"
                " evaluate val"
            )
        return self.tables[split]


def load_splits(config: ExperimentConfig) -> Splits:
    """Read the data set and apply the protocol.

    `honest`: val is the published val, else `data.val_fraction` of train, stratified by label and seeded; whole groups with
    `data.group_column`. Test is the held-out split, if
    there is one. `paper`: val is the held-out split, and no other split is scored.

    Raises:
        UserError: if the data set has any fault; the message names the file and the fix.
    """
    published = read_published(config.data)
    train, held_out = published.train, published.held_out
    notes = [note for table in (train, published.val, held_out) if table is not None for note in table.notes]
    if held_out is None:
        if config.protocol == "paper":
            raise UserError(f"{train.source}: there is no test split, which protocol=paper scores; use protocol=honest")
        notes.append("there is no test split: the only score is that on val, which also chooses the best epoch")
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
        rest, part = split_off(train, config.data.val_fraction, config.data.split_seed)
        if not len(part):
            what = (
                "is no image"
                if train.groups is None
                else "is no whole group: all are in one group of data.group_column"
            )
            raise UserError(
                f"{train.source}: data.val_fraction={config.data.val_fraction} of its {len(train)} train images {what};"
                " add images, raise data.val_fraction, or put images in a split val"
            )
        notes.append(
            f"protocol honest: {len(part)} of {len(train)} train images are val (data.val_fraction={config.data.val_fraction})"
            + (f", {held_out.source} is test" if held_out is not None else "")
            + ("; no group is in two splits" if train.groups is not None else "")
        )
        splits = Splits(train.take(rest), train.take(part), held_out, tuple(notes))
    for name, table in splits.tables.items():
        if not (table.targets == 1).any():
            raise UserError(f"{name} split ({table.source}): no image has a label; add labels to train on and to score")
    return splits


def fingerprint(*tables: SampleTable) -> str:
    """Return the sha256 of label names, image ids and targets. The location of the files has no effect."""
    digest = hashlib.sha256()
    for table in tables:
        digest.update("\n".join(table.label_names).encode())
        for start in range(0, len(table), _IDS_PER_BLOCK):
            ids = table.table["image_id"].slice(start, _IDS_PER_BLOCK).combine_chunks()
            joined = pc.binary_join(pa.ListArray.from_arrays([0, len(ids)], ids), "\n")[0]
            digest.update(b"\n" * bool(start))
            digest.update(joined.as_buffer())
        digest.update(table.targets.data)
    return digest.hexdigest()
