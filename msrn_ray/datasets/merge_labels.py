"""Joins labels that are one label under several names (`data.merge_labels`), and leaves out words for none (`data.none_values`)."""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..io.storage import Location
from ..types import ABSENT, PRESENT, UNKNOWN, SampleTable
from .text_files import first_few, read_lines

_LAYOUT = "write one line per group: the name to keep, then the names that it replaces, separated by tabs or as CSV"

# without blanks, "_" and "-", in lower case. "healthy" and "normal" are not here: they are diagnoses
WORDS_FOR_NONE = {
    *("nan", "none", "null", "nil", "na", "n/a", "#n/a", "<na>", "nat", "notapplicable", "nothing", "empty", "void"),
    *("nofinding", "nofindings", "nolabel", "nolabels", "noobject", "noobjects", "noclass", "notag", "notags"),
    *("unlabeled", "unlabelled", "background", "", "?"),
}


@dataclass(frozen=True)
class LabelGroup:
    """The name to keep, and the names that it replaces."""

    kept: str
    replaced: tuple[str, ...]


@dataclass(frozen=True)
class LabelMerge:
    """How the labels of a data set are joined; C labels before, K labels after.

    Attributes:
        label_names: the K names.
        sources: for each of the K labels, the columns of the C labels that it joins.
        note: a line for the user.
    """

    label_names: tuple[str, ...]
    sources: tuple[tuple[int, ...], ...]
    note: str

    def apply(self, samples: SampleTable) -> SampleTable:
        """Return the samples with the joined labels: present if any of a group is, else unknown if any is, else absent."""
        old = samples.targets
        new = np.empty((len(samples), len(self.label_names)), np.int8)
        for column, sources in enumerate(self.sources):
            new[:, column] = _join(old[:, sources])
        return samples.with_targets(new, self.label_names)


def plan_none(words: Sequence[str], label_names: Sequence[str]) -> LabelMerge:
    """Return the labels without the words that mark images without a label.

    Args:
        words: `data.none_values`, spelled as in the data.
        label_names: the C labels.

    Raises:
        UserError: if a word is no label, or no label remains.
    """
    for word in words:
        if word not in label_names:
            close = get_close_matches(word, label_names, 1)
            meant = f"; did you mean {close[0]!r}?" if close else f" ({first_few(label_names)})"
            raise UserError(f"data.none_values: {word!r} is none of the {len(label_names)} labels{meant}")
    kept = [position for position, name in enumerate(label_names) if name not in words]
    if not kept:
        raise UserError("data.none_values: names all labels, so none remains; leave out those that are labels")
    names = tuple(label_names[position] for position in kept)
    note = f"data.none_values: {', '.join(map(repr, words))} is no label; {len(names)} labels remain"
    return LabelMerge(names, tuple((position,) for position in kept), note)


def none_notes(label_names: Sequence[str]) -> list[str]:
    """Return a note on each label that is a word for none. Such a word may be a label too, so it stays one."""
    return [
        f"the label {name!r} is a word for none; if it marks images without a label, give --data.none-values {shlex.quote(name)}"
        for name in label_names
        if re.sub(r"[\s_-]+", "", name.casefold()) in WORDS_FOR_NONE
    ]


def plan_merge(file: Location, label_names: Sequence[str]) -> LabelMerge:
    """Read the file of groups and find its names among the labels.

    Args:
        file: one line per group: the name to keep, then the names that it replaces. A line with a tab is split at its tabs, any other
            line is CSV. The name to keep may be new.
        label_names: the C labels. A kept name that is one of them keeps its place; a new name gets that of the first replaced name.

    Raises:
        UserError: with file and line, if a line names no label to replace, a name is not a label, or a name repeats.
    """
    groups = _read_groups(file, label_names)
    columns = {name: column for column, name in enumerate(label_names)}
    joined: dict[int, tuple[str, tuple[int, ...]]] = {}
    gone: set[int] = set()
    for group in groups:
        members = tuple(columns[name] for name in (group.kept, *group.replaced) if name in columns)
        joined[members[0]] = group.kept, members
        gone.update(members[1:])
    remaining = [column for column in range(len(label_names)) if column not in gone]
    labels = [joined.get(column, (label_names[column], (column,))) for column in remaining]
    shown = first_few(f"{group.kept} <- {', '.join(group.replaced)}" for group in groups)
    note = f"{file.name}: {len(label_names)} labels joined to {len(labels)} ({shown})"
    return LabelMerge(tuple(name for name, _ in labels), tuple(sources for _, sources in labels), note)


def _read_groups(file: Location, label_names: Sequence[str]) -> list[LabelGroup]:
    groups: list[LabelGroup] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(read_lines(file, f"data.merge_labels: {_LAYOUT}"), 1):
        cells = line.split("\t") if "\t" in line else next(csv.reader([line], skipinitialspace=True), [])
        names = [name for cell in cells if (name := cell.strip())]
        if not names:
            continue
        if len(names) == 1:
            raise UserError(f"{file}, line {number}: {names[0]!r} stands alone and replaces no label; {_LAYOUT}")
        for name in names:
            if name in line_of:
                raise UserError(
                    f"{file}, line {number}: {name!r} is in line {line_of[name]} already; put each name in one group, once"
                )
            line_of[name] = number
        for name in names[1:]:
            if name not in label_names:
                raise UserError(
                    f"{file}, line {number}: {name!r} is no label of the data set; {_suggest(name, label_names)}"
                )
        groups.append(LabelGroup(names[0], tuple(names[1:])))
    if not groups:
        raise UserError(f"{file}: is empty; {_LAYOUT}")
    return groups


def _suggest(name: str, label_names: Sequence[str]) -> str:
    close = get_close_matches(name, label_names, 3, 0.7) or list(label_names)
    shown = first_few(map(ascii, close), 5)  # escapes show no-break spaces and decomposed letters
    return f"its labels are {shown}; correct the name or remove it (labels of prepared shards may be joined already)"


def _join(targets: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """Return [n] of [n, G] targets in {1, 0, -1}."""
    known = np.where((targets == UNKNOWN).any(1), UNKNOWN, ABSENT)
    return np.where((targets == PRESENT).any(1), PRESENT, known).astype(np.int8)
