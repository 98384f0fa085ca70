"""Which images are train, val and test: the registry of readers and the protocol."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config import Dataset, DataSettings, ExperimentConfig
from .datasets.apparel import read_apparel
from .datasets.coco import has_split, read_coco
from .datasets.containers import read_label_list
from .datasets.huggingface import read_huggingface
from .datasets.nuswide import read_nuswide
from .datasets.prepared import PreparedInfo, read_info, read_prepared
from .datasets.scenes import generate_scenes
from .datasets.split import stratified_split
from .datasets.voc import read_voc
from .datasets.webdataset import read_webdataset
from .errors import UserError
from .storage import Location, in_row_group
from .types import SampleTable

_TEST_FRACTION = 0.25  # of data sets that publish no split
# Settings of tensors, words and protocol, the seed among them; of a list of labels the names are kept, not where it lay
_NOT_OF_READERS = {
    *("dataset", "root", "image_size", "crop_scales", "flip", "max_pixels", "max_bad_fraction"),
    *("word_vectors", "missing_words", "val_fraction", "split_seed", "labels"),
}


@dataclass(frozen=True)
class Splits:
    """The three parts of a data set under a protocol.

    Attributes:
        train: what is learnt from, and what the label graph is counted on.
        val: what the best epoch is chosen on.
        test: scored once at the end; None where val is the published test split (protocol `paper`).
        notes: lines for the user.
    """

    train: SampleTable
    val: SampleTable
    test: SampleTable | None
    notes: tuple[str, ...]

    def named(self, split: str) -> SampleTable:
        """`train`, `val` or `test`.

        Raises:
            UserError: for `test` where the protocol leaves none.
        """
        table = {"train": self.train, "val": self.val, "test": self.test}[split]
        if table is None:
            raise UserError("under protocol=paper val is the published test split; evaluate val")
        return table


@dataclass(frozen=True)
class Published:
    """The splits as a benchmark publishes them; `held_out` is scored, `val` only where three are published."""

    train: SampleTable
    val: SampleTable | None
    held_out: SampleTable


def load_splits(config: ExperimentConfig) -> Splits:
    """Reads the data set and applies the protocol.

    `honest`: val is the published val, else `data.val_fraction` of train, stratified by label and seeded; test is what is held out.
    `paper`: val is what is held out, and nothing else is scored.

    Raises:
        UserError: for anything wrong with the data set, naming file and mend.
    """
    published = read_published(config.data)
    train, held_out = published.train, published.held_out
    notes = [*train.notes, *(published.val.notes if published.val else ()), *held_out.notes]
    if any(in_row_group(uri) for uri in train.table["uri"][:1].to_pylist()):
        notes.append(
            "images lie in row groups of Parquet files: slow to train from in random order; `msrn prepare` them first"
        )
    if config.protocol == "paper":
        notes.append(
            f"protocol paper: the best epoch is chosen on the test split ({held_out.source}), as the papers do"
        )
        splits = Splits(train, held_out, None, tuple(notes))
    elif published.val is not None:
        splits = Splits(train, published.val, held_out, tuple(notes))
    else:
        rest, part = stratified_split(train.targets, config.data.val_fraction, config.data.split_seed)
        notes.append(
            f"protocol honest: {len(part)} of {len(train)} train images are val (data.val_fraction={config.data.val_fraction}),"
            f" {held_out.source} is test"
        )
        splits = Splits(train.take(rest), train.take(part), held_out, tuple(notes))
    for name, table in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
        if table is not None and not (table.targets == 1).any():
            raise UserError(f"{name} split ({table.source}): no image has a label, nothing to learn or to score")
    return splits


def read_published(settings: DataSettings) -> Published:
    """The published splits: where `data.root` holds a prepared data set from there, whatever `data.dataset` says; else by the reader.

    Raises:
        UserError: for anything wrong with the data set, naming file and mend.
    """
    if settings.root is not None:
        root = Location.of(settings.root)
        info = read_info(root)
        if info is not None:
            return _prepared(root, info, settings)
    return READERS[settings.dataset](settings)


def reader_settings(settings: DataSettings) -> dict[str, Any]:
    """The settings that decide what a reader gives, by name; the others count when a prepared data set is read, too."""
    return settings.model_dump(mode="json", exclude=_NOT_OF_READERS)


def _prepared(root: Location, info: PreparedInfo, settings: DataSettings) -> Published:
    tables = read_prepared(root, info)
    now = reader_settings(settings)
    notes = [f"read from prepared shards ({info.dataset}, {info.content[:12]}): {root}"]
    notes += [
        f"data.{name} was {value!r} when the data was prepared and stays so; {now[name]!r} has no effect"
        for name, value in info.settings.items()
        if now.get(name) not in (None, value)
    ]
    train = replace(tables["train"], notes=(*notes, *tables["train"].notes))
    return Published(train, tables.get("val"), tables["test"])


def _root(settings: DataSettings) -> Path:
    root = _given(settings)
    if "://" in root:
        raise UserError(f"data.root {settings.root}: give a folder on this machine or a mounted one")
    return Path(root).expanduser().resolve()


def _given(settings: DataSettings) -> str:
    if settings.root is None:
        raise UserError(f"data.root is needed: the folder of the {settings.dataset} data set (--data.root DIR)")
    return settings.root


def default_scenes_root() -> Path:
    """Where the embedded data set lives: the user's cache folder (XDG_CACHE_HOME or ~/.cache)."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "msrn_ray" / "scenes"


def _coco(settings: DataSettings) -> Published:
    return _coco_layout(_root(settings), settings)


def _scenes(settings: DataSettings) -> Published:
    root = _root(settings) if settings.root else default_scenes_root()
    return _coco_layout(generate_scenes(root), settings)


def _coco_layout(root: Path, settings: DataSettings) -> Published:
    train = read_coco(root, "train", keep_unlabelled=settings.keep_unlabelled_train)
    val = read_coco(root, "val", keep_unlabelled=settings.keep_unlabelled_eval)
    if has_split(root, "test"):  # COCO's own test labels are not published; a data set in its layout may have them
        return Published(train, val, read_coco(root, "test", keep_unlabelled=settings.keep_unlabelled_eval))
    return Published(train, None, val)


def _voc(settings: DataSettings) -> Published:
    root = _root(settings)
    train, test = (read_voc(root, split, difficult=settings.voc_difficult) for split in ("trainval", "test"))
    return Published(train, None, test)


def _nuswide(settings: DataSettings) -> Published:
    root = _root(settings)
    train = read_nuswide(root, "Train", keep_unlabelled=settings.keep_unlabelled_train)
    return Published(train, None, read_nuswide(root, "Test", keep_unlabelled=settings.keep_unlabelled_eval))


def _apparel(settings: DataSettings) -> Published:
    return _held_out_by_seed(read_apparel(_root(settings)), settings)


def _held_out_by_seed(table: SampleTable, settings: DataSettings) -> Published:
    rest, part = stratified_split(table.targets, _TEST_FRACTION, settings.split_seed)
    test = table.take(part)
    return Published(
        table.take(rest),
        None,
        SampleTable(test.table, test.label_names, f"{len(part)} images by seed {settings.split_seed}"),
    )


def _huggingface(settings: DataSettings) -> Published:
    root = Location.of(_given(settings))
    labels = None if settings.labels is None else read_label_list(Location.of(settings.labels))
    tables = read_huggingface(
        root, label_names=labels, image_column=settings.image_column, label_column=settings.label_column
    )
    return _published(tables, settings)


def _webdataset(settings: DataSettings) -> Published:
    root = Location.of(_given(settings))
    labels = None if settings.labels is None else read_label_list(Location.of(settings.labels))
    return _published(read_webdataset(root, label_names=labels, label_field=settings.label_column), settings)


def _published(tables: dict[str, SampleTable], settings: DataSettings) -> Published:
    """By the names that a data set gives its splits: without test, val is held out; without both, a part of train by seed."""
    train, val, test = (tables.get(name) for name in ("train", "val", "test"))
    assert train is not None
    if test is not None:
        return Published(train, val, test)
    return Published(train, None, val) if val is not None else _held_out_by_seed(train, settings)


READERS: dict[Dataset, Callable[[DataSettings], Published]] = {
    "scenes": _scenes,
    "coco": _coco,
    "voc": _voc,
    "nuswide": _nuswide,
    "apparel": _apparel,
    "huggingface": _huggingface,
    "webdataset": _webdataset,
}


def fingerprint(*tables: SampleTable) -> str:
    """sha256 of label names, image ids and targets; where the files lie makes no difference."""
    digest = hashlib.sha256()
    for table in tables:
        digest.update("\n".join(table.label_names).encode())
        digest.update("\n".join(table.table["image_id"].to_pylist()).encode())
        digest.update(table.targets.tobytes())
    return digest.hexdigest()
