"""Splits of a manifest that stand in other files beside it: a manifest per split, or lists of image names."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from ..errors import UserError
from ..io.storage import Location
from ..types import ABSENT, SampleTable
from .manifest import CustomImages
from .split_names import SPLIT_WORDS, SPLITS, SplitName
from .table_files import open_table
from .text_files import first_few, read_lines

_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLIT_WORDS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)
_LIST = re.compile(
    r"(?<![a-z])(train_?val|train|val|valid|validation|test)(_?(list|split|set|images))?\.txt", re.IGNORECASE
)
_PARTITION = "list_eval_partition.csv"  # CelebA's, as Kaggle has it
_NUMBERS: dict[str, SplitName] = {"0": "train", "1": "val", "2": "test"}


def find_split_files(manifest: Location) -> tuple[dict[SplitName, Location], tuple[str, ...]]:
    """Return the manifest of each split, if `manifest` is called after train and others beside it are called after other splits.

    Either the name of the file differs (`train.csv`, `val.csv`; `labels_train.csv`, ...), or the folder (`train/_classes.csv`, ...).

    Returns:
        The files by split; {"train": manifest} if there are no others. And notes on files that are not read.
    """
    stem, dot, suffix = manifest.name.partition(".")
    in_name = _WORD.search(stem)
    in_folder = None if in_name else _WORD.fullmatch(manifest.parent.name)
    match = in_name or in_folder
    if match is None:
        return {"train": manifest}, ()
    own = SPLIT_WORDS[match[1].lower()]
    if own != "train":
        return {"train": manifest}, (f"{manifest.name}: is called after {own}, and is read as images to train on",)
    found: dict[SplitName, Location] = {"train": manifest}
    notes = []
    columns = {*open_table(manifest).names}
    for word, split in SPLIT_WORDS.items():
        if in_name:
            beside = manifest.parent / f"{stem[: match.start()]}{word}{stem[match.end() :]}{dot}{suffix}"
        else:
            beside = manifest.parent.parent / word / manifest.name
        if split in found or not beside.is_file():
            continue
        if missing := sorted(columns - {*open_table(beside).names}):
            notes.append(f"{beside}: not read as {split}, for it lacks the columns {first_few(map(repr, missing))}")
        else:
            found[split] = beside
    return found, tuple(notes)


def join_split_files(parts: Mapping[SplitName, SampleTable]) -> dict[SplitName, SampleTable]:
    """Return the splits with the labels of all of them; a label that a split never lists is absent there.

    Raises:
        UserError: if an image is in two splits.
    """
    names = tuple(sorted({name for table in parts.values() for name in table.label_names}))
    names = next((table.label_names for table in parts.values() if {*table.label_names} == {*names}), names)
    seen: dict[SplitName, SampleTable] = {}
    for split, table in parts.items():
        for other, before in seen.items():
            both = table.table.filter(pc.is_in(table.table["uri"], before.table["uri"]))["uri"]
            if len(both):
                raise UserError(
                    f"{table.source}: {len(both)} of its images are in {before.source} too ({first_few(both.to_pylist())}), so they"
                    f" would be in {other} and {split}; keep each image in one"
                )
        seen[split] = table if table.label_names == names else table.with_targets(_columns(table, names), names)
    return seen


def _columns(table: SampleTable, names: tuple[str, ...]) -> npt.NDArray[np.int8]:
    position = {name: at for at, name in enumerate(table.label_names)}
    targets = np.full((len(table), len(names)), ABSENT, np.int8)
    for at, name in enumerate(names):
        if name in position:
            targets[:, at] = table.targets[:, position[name]]
    return targets


def read_split_lists(manifest: Location, samples: SampleTable) -> tuple[npt.NDArray[np.int8] | None, tuple[str, ...]]:
    """Return the split of each image from lists beside the manifest: `train_val_list.txt` and `test_list.txt`, or CelebA's partition.

    Returns:
        [n] int8, positions in `SPLITS`; None without such lists, or if they do not name each image once. And notes on them.
    """
    split_of: dict[str, SplitName] = {}
    files = []
    for name in sorted(manifest.parent.names(missing_ok=True)):
        match = _LIST.fullmatch(name)
        if match is None and name != _PARTITION:
            continue
        lines = [line.strip() for line in read_lines(manifest.parent / name, "") if line.strip()]
        if match is not None:
            split = "train" if match[1].lower().startswith("train") else SPLIT_WORDS[match[1].lower()]
            pairs = [(line, split) for line in lines]
        else:
            rows = [line.split(",") for line in lines[1:]]
            pairs = [(row[0], _NUMBERS[row[1]]) for row in rows if len(row) == 2 and row[1] in _NUMBERS]
        files.append(name)
        for line, split in pairs:
            key = posixpath.basename(line.replace("\\", "/"))
            if split_of.setdefault(key, split) != split:
                return None, (f"{manifest.parent / name}: not used as splits, for {key!r} is in two",)
    if not files:
        return None, ()
    found = [split_of.get(posixpath.basename(uri)) for uri in samples.table["uri"].to_pylist()]
    shown = first_few(files)
    if None in found:
        covered = sum(split is not None for split in found)
        note = f"{manifest.name}: {shown} beside it are not used as splits: they name {covered} of {len(found)} images"
        return None, (note,)
    codes = np.array([SPLITS.index(split) for split in found if split is not None], np.int8)
    return codes, (f"{manifest.name}: the splits are those of {shown}",)


def tables_by_split(images: CustomImages) -> dict[SplitName, SampleTable]:
    """Return the images of each split that has any; all are train if there are no splits."""
    if images.split is None:
        return {"train": images.samples}
    rows = {name: np.flatnonzero(images.split == position) for position, name in enumerate(SPLITS)}
    return {name: images.samples.take(part) for name, part in rows.items() if len(part)}
