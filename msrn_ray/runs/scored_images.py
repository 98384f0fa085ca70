"""Decides which images an evaluation scores: those of the split that the run recorded, never by accident those it trained on.

- The requested split holds the recorded images: it is scored.
- The data set of the run has changed: the recorded images that still exist are scored. New images are left out, because a split that is
  drawn again may mix them with images of train.
- Other data or other settings of the split: scored as drawn, unless it holds images that the run trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..config import ExperimentConfig
from ..datasets.protocol import Splits, fingerprint, load_splits
from ..datasets.registry import reader_settings
from ..errors import UserError
from ..types import PRESENT, SampleTable
from .checkpoint import Checkpoint
from .split_file import RecordedSplits

# Settings that choose among the images of a reader. They draw no split, so the recorded split holds under them
_FILTERS = {"missing_images", "keep_unlabelled_train", "keep_unlabelled_eval"}
_NUM_NAMED = 5  # images that a message names


@dataclass(frozen=True)
class ScoredImages:
    """What an evaluation scores.

    Attributes:
        table: the images.
        notes: lines for the user.
        num_trained: how many of the images the run trained on; None if unknown.
    """

    table: SampleTable
    notes: tuple[str, ...]
    num_trained: int | None


@dataclass(frozen=True)
class Request:
    """What the user asked to score.

    Attributes:
        config: data and protocol.
        split: `train`, `val` or `test`.
        allow_train_images: whether a split may be scored that holds images of train.
    """

    config: ExperimentConfig
    split: str
    allow_train_images: bool = False


def choose_images(request: Request, checkpoint: Checkpoint, recorded: RecordedSplits | None) -> ScoredImages:
    """Return the images to score; the module's docstring states the rule.

    Raises:
        UserError: if the data set has a fault, has no such split, or the split holds images that the run trained on.
    """
    splits = load_splits(request.config)
    if recorded is None:
        return _without_record(request, checkpoint, splits)
    expected = recorded.tables.get(request.split)
    drawn = splits.tables.get(request.split)
    key = _KeyOf.of(recorded)
    if expected is not None and drawn is not None and _same_images(drawn.table, expected, key):
        notes = [*splits.notes, *_relabelled(drawn, recorded, expected, key)]
        return ScoredImages(drawn, tuple(notes), len(drawn) if request.split == "train" else 0)
    in_place = request.config.data.root == checkpoint.config.data.root
    if (
        expected is not None
        and _draws_alike(request.config, checkpoint.config)
        and (in_place or _holds_half(splits, expected, key))
    ):
        return _recorded_images(request, splits, recorded, key)
    return _as_drawn(request, splits, recorded, key)


def _without_record(request: Request, checkpoint: Checkpoint, splits: Splits) -> ScoredImages:
    """Score the split as drawn. The checkpoint knows the fingerprint of the images that its label counts come from."""
    provenance = checkpoint.counts.provenance
    table = splits.named(request.split)
    if (
        checkpoint.config.data.label_counts is None
        and provenance
        and fingerprint(splits.train) == provenance.fingerprint
    ):
        return ScoredImages(table, splits.notes, len(table) if request.split == "train" else 0)
    note = f"no split.parquet in the checkpoint's run folder: {request.split} may hold images that the run trained on"
    return ScoredImages(table, (*splits.notes, note), None)


def _draws_alike(config: ExperimentConfig, trained: ExperimentConfig) -> bool:
    """Return whether two configs draw equal splits from equal files."""

    def drawing(config: ExperimentConfig) -> dict[str, object]:
        data = config.data
        kept = {name: value for name, value in reader_settings(data).items() if name not in _FILTERS}
        return kept | {
            "dataset": data.dataset,
            "val_fraction": data.val_fraction,
            "split_seed": data.split_seed,
            "protocol": config.protocol,
        }

    return drawing(config) == drawing(trained)


def _same_images(table: pa.Table, expected: pa.Table, key: _KeyOf) -> bool:
    """Return whether a split holds exactly the recorded images; prepared images have no file names, so their ids are compared."""
    by = _KeyOf(0) if _in_shards(table) else key
    return len(table) == len(expected) and bool(
        np.array_equal(np.sort(_texts(by(table))), np.sort(_texts(by(expected))))
    )


def _in_shards(table: pa.Table) -> bool:
    return bool(pc.any(pc.match_substring(table["uri"], "#")).as_py())


def _texts(column: pa.ChunkedArray) -> npt.NDArray[np.object_]:
    return np.asarray(column.to_numpy(), dtype=object)


@dataclass(frozen=True)
class _KeyOf:
    """How images are recognised.

    Attributes:
        parts: 0: by id. Exports with a file per split repeat ids, so then 1: by file name, or 2: by folder and file name.
    """

    parts: int

    @classmethod
    def of(cls, recorded: RecordedSplits) -> _KeyOf:
        """Choose the first key that differs between all images that a run recorded."""
        for parts in (0, 1):
            keys = _joined([cls(parts)(table) for table in recorded.tables.values()])
            if pc.count_distinct(keys).as_py() == len(keys):
                return cls(parts)
        return cls(2)

    def __call__(self, table: pa.Table) -> pa.ChunkedArray:
        """Return the [n] keys of a table."""
        if self.parts == 0:
            return table["image_id"]
        return pc.replace_substring_regex(table["uri"], rf"^.*?((?:[^/]*/){{{self.parts - 1}}}[^/]*)$", r"\1")


def _holds_half(splits: Splits, expected: pa.Table, key: _KeyOf) -> bool:
    """Return whether a data set elsewhere holds at least half of the recorded images: then it is the run's, moved."""
    known = _joined([key(table.table) for table in splits.tables.values()])
    return 2 * _count(pc.is_in(key(expected), value_set=known)) >= len(expected)


def _recorded_images(request: Request, splits: Splits, recorded: RecordedSplits, key: _KeyOf) -> ScoredImages:
    """Return the images of the recorded split that still exist, whatever split they are drawn into."""
    config, expected = request.config, recorded.tables[request.split]
    # a split that is drawn again may drop unlabelled images that the run scored
    whole = load_splits(
        config.with_overrides({"data.keep_unlabelled_train": True, "data.keep_unlabelled_eval": True})
    ).tables.values()
    tables = list(whole)
    merged = replace(tables[0], table=pa.concat_tables([table.table for table in tables]))
    rows = np.flatnonzero(pc.is_in(key(merged.table), value_set=key(expected)).to_numpy())
    table = merged.take(rows)
    if not (config.data.keep_unlabelled_train if request.split == "train" else config.data.keep_unlabelled_eval):
        table = table.take(np.flatnonzero((table.targets == PRESENT).any(1)))
    if not len(table):
        raise UserError(
            f"{request.split}: none of the {len(expected)} images that the run recorded is in the data set"
            f" ({tables[0].source}); give the run's data with --data.root"
        )
    source = f"{request.split} as the run recorded it, of {table.source}"
    table = replace(table, source=source)
    gone = key(expected).filter(pc.invert(pc.is_in(key(expected), value_set=key(merged.table))))
    all_known = _joined([key(part) for part in recorded.tables.values()])
    current = _joined([key(part.table) for part in splits.tables.values()])
    new = current.filter(pc.invert(pc.is_in(current, value_set=all_known)))
    notes = [
        *splits.notes,
        f"the data set has changed since the run: {request.split} is the split that the run recorded",
    ]
    if len(new):
        notes.append(f"new: {len(new)} images that the run did not know are left out ({_named(new)})")
    if len(gone):
        notes.append(f"gone: {len(gone)} of {len(expected)} recorded {request.split} images ({_named(gone)})")
    notes += _relabelled(table, recorded, expected, key)
    return ScoredImages(table, tuple(notes), len(table) if request.split == "train" else 0)


def _relabelled(table: SampleTable, recorded: RecordedSplits, expected: pa.Table, key: _KeyOf) -> Iterator[str]:
    """Yield a note on recorded images whose labels have changed."""
    if table.label_names != recorded.label_names:
        return
    rows = pc.index_in(key(expected), value_set=key(table.table))
    known = np.flatnonzero(rows.is_valid().to_numpy())
    before = SampleTable(expected, recorded.label_names, "").targets[known]
    after = table.targets[rows.drop_null().to_numpy()]
    changed = key(expected).take(pa.array(known[(before != after).any(1)]))
    if len(changed):
        yield f"relabelled: {len(changed)} images are scored with the labels that they have now ({_named(changed)})"


def _as_drawn(request: Request, splits: Splits, recorded: RecordedSplits, key: _KeyOf) -> ScoredImages:
    """Return the split as drawn if it holds no image of train, or if the user allows that.

    Raises:
        UserError: with the images of train.
    """
    table, train = splits.named(request.split), recorded.tables["train"]
    trained = pc.is_in(key(table.table), value_set=key(train))
    # a reader may give the same file another id; a part of a file may hold another image when the file is written again
    whole_files = pc.invert(pc.match_substring(table.table["uri"], "#"))
    trained = pc.or_(trained, pc.and_(whole_files, pc.is_in(table.table["uri"], value_set=train["uri"])))
    ids = table.table["image_id"].filter(trained)
    notes = [*splits.notes]
    if key.parts and (_in_shards(table.table) or _in_shards(train)):
        notes.append(
            f"{request.split} may hold images that the run trained on: its splits repeat ids, and prepared images have no file"
            " names to compare"
        )
        return ScoredImages(table, tuple(notes), None)
    if len(ids) and request.split != "train" and not request.allow_train_images:
        raise UserError(
            f"{request.split} ({table.source}): the run trained on {len(ids)} of its {len(table)} images ({_named(ids)}); score"
            " with the data settings of the run, which holds its split, or add --allow-train-images"
        )
    if len(ids):
        notes.append(f"{request.split}: the run trained on {len(ids)} of its {len(table)} images ({_named(ids)})")
    else:
        notes.append(f"{request.split} is another split than the run's; it holds no image that the run trained on")
    return ScoredImages(table, tuple(notes), len(ids))


def _joined(columns: Sequence[pa.ChunkedArray]) -> pa.ChunkedArray:
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())


def _count(mask: pa.ChunkedArray) -> int:
    return int(pc.sum(mask).as_py() or 0)


def _named(ids: pa.ChunkedArray) -> str:
    more = ", ..." if len(ids) > _NUM_NAMED else ""
    return f"{', '.join(ids[:_NUM_NAMED].to_pylist())}{more}"
