"""Which images are train, val and test: the registry of readers and the protocol."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .config import Dataset, DataSettings, ExperimentConfig
from .datasets.apparel import read_apparel
from .datasets.coco import find_year, has_split, read_coco
from .datasets.folders import read_folders
from .datasets.huggingface import read_huggingface
from .datasets.label_columns import read_label_names
from .datasets.manifest import OwnImages, read_manifest
from .datasets.nuswide import read_nuswide
from .datasets.prepared import PreparedInfo, read_info, read_prepared
from .datasets.scenes import generate_scenes
from .datasets.split import SPLITS, Rows, stratified_split
from .datasets.voc import Difficult, find_voc, read_voc
from .datasets.webdataset import read_webdataset
from .errors import UserError
from .storage import Location, in_row_group
from .types import PRESENT, SampleTable

# Settings of tensors, words and protocol, the seed among them; of a list of labels the names are kept, not where it lay
_NOT_OF_READERS = {
    *("dataset", "root", "image_size", "crop_scales", "flip", "max_pixels", "max_bad_fraction"),
    *("word_vectors", "missing_words", "label_counts", "val_fraction", "split_seed", "labels"),
}


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


@dataclass(frozen=True)
class Published:
    """The splits as a data set comes with them.

    Attributes:
        train: what may be learnt from.
        val: None where it is to be taken from train.
        held_out: what is scored; None where nothing is set aside, which only one's own images may leave so.
    """

    train: SampleTable
    val: SampleTable | None
    held_out: SampleTable | None


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
        notes.append(
            f"protocol honest: {len(part)} of {len(train)} train images are val (data.val_fraction={config.data.val_fraction})"
            + (f", {held_out.source} is test" if held_out is not None else "")
        )
        splits = Splits(train.take(rest), train.take(part), held_out, tuple(notes))
    for name, table in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
        if table is not None and table.label_names != splits.train.label_names:
            differ = sorted(set(table.label_names) ^ set(splits.train.label_names))
            raise UserError(
                f"{name} split ({table.source}): its labels are not those of train ({splits.train.source}): only one has"
                f" {', '.join(differ[:5])}; use files of the same labels"
            )
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
    return Published(train, tables.get("val"), tables.get("test"))


def _root(settings: DataSettings) -> Location:
    if settings.root is None:
        raise UserError(f"data.root is needed: the folder of the {settings.dataset} data set (--data.root DIR or URI)")
    return Location.of(settings.root)


def default_scenes_root() -> Path:
    """Where the embedded data set lives: the user's cache folder (XDG_CACHE_HOME or ~/.cache)."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "msrn_ray" / "scenes"


def _coco(settings: DataSettings) -> Published:
    return _coco_layout(_root(settings), settings)


def _scenes(settings: DataSettings) -> Published:
    root = _root(settings) if settings.root else Location.of(default_scenes_root())
    if not root.is_local:
        raise UserError(
            f"data.root {root}: scenes are generated into a folder on this machine; a copy elsewhere is read with --data.dataset coco"
        )
    return _coco_layout(Location.of(generate_scenes(Path(str(root)))), settings)


def _coco_layout(root: Location, settings: DataSettings) -> Published:
    year = find_year(root, "train", settings.year)  # of all splits: val2014 and train2017 share images

    def read(split: str, keep_unlabelled: bool) -> SampleTable:
        return read_coco(
            root,
            split,
            keep_unlabelled=keep_unlabelled,
            crowd=settings.crowd,
            year=year,
            missing_images=settings.missing_images,
        )

    train = read("train", settings.keep_unlabelled_train)
    val = read("val", settings.keep_unlabelled_eval)
    # COCO's own test labels are not published; a data set in its layout may have them
    if has_split(root, "test", year):
        return Published(train, val, read("test", settings.keep_unlabelled_eval))
    return Published(train, None, val)


def _voc(settings: DataSettings) -> Published:
    base = find_voc(_root(settings), settings.year)
    # the labels of VOC2012's test split are not published
    names = ("train", "val") if base.name == "VOC2012" else ("trainval", "test")
    difficult = settings.voc_difficult
    policies: tuple[Difficult, Difficult] = (
        ("positive", "ignore") if difficult == "reference" else (difficult, difficult)
    )
    train, test = (
        read_voc(base, name, difficult=policy, missing_images=settings.missing_images)
        for name, policy in zip(names, policies, strict=True)
    )
    return Published(train, None, test)


def _nuswide(settings: DataSettings) -> Published:
    train, test = (
        read_nuswide(
            _root(settings),
            split,
            keep_unlabelled=keep_unlabelled,
            form=settings.nuswide_form,
            concepts=settings.concepts,
            missing_images=settings.missing_images,
        )
        for split, keep_unlabelled in (
            ("Train", settings.keep_unlabelled_train),
            ("Test", settings.keep_unlabelled_eval),
        )
    )
    return Published(train, None, test)


def _apparel(settings: DataSettings) -> Published:
    table = read_apparel(_root(settings), single_labels=settings.apparel_single_labels)
    return _held_out_by_seed(table, settings, settings.apparel_test_fraction)


def _held_out_by_seed(table: SampleTable, settings: DataSettings, fraction: float) -> Published:
    if fraction == 0:
        return Published(table, None, None)
    rest, part = stratified_split(table.targets, fraction, settings.split_seed)
    test = table.take(part)
    return Published(
        table.take(rest),
        None,
        SampleTable(test.table, test.label_names, f"{len(part)} images by seed {settings.split_seed}"),
    )


def _manifest(settings: DataSettings) -> Published:
    return _divide(
        read_manifest(
            _place(settings, "the file of the manifest (--data.root FILE)"),
            image_column=settings.image_column,
            label_column=settings.label_column,
            label_separator=settings.label_separator,
            label_names=_label_names(settings),
            missing_images=settings.missing_images,
        ),
        settings,
    )


def _folders(settings: DataSettings) -> Published:
    root = _place(settings, "the folder that holds a folder for each label (--data.root DIR)")
    return _divide(read_folders(root, label_names=_label_names(settings)), settings)


def _place(settings: DataSettings, what: str) -> Location:
    if settings.root is None:
        raise UserError(f"data.root is needed: {what}")
    return Location.of(settings.root)


def _label_names(settings: DataSettings) -> tuple[str, ...] | None:
    return None if settings.labels is None else read_label_names(Location.of(settings.labels))


def _divide(images: OwnImages, settings: DataSettings) -> Published:
    """By the splits that the data set names, else test by seed."""
    samples, seed = images.samples, settings.split_seed
    notes = samples.notes
    if images.split is not None and (images.split != SPLITS.index("train")).any():
        parts = {split: np.flatnonzero(images.split == position) for position, split in enumerate(SPLITS)}
    elif settings.test_fraction:
        rest, part = stratified_split(samples.targets, settings.test_fraction, seed)
        parts = {"train": rest, "test": part}
        notes += (
            f"no splits are named: test is drawn (data.test_fraction={settings.test_fraction}, data.split_seed={seed})",
        )
    else:
        parts = {"train": np.arange(len(samples))}
    tables = {name: _part(samples, name, rows, settings) for name, rows in parts.items() if len(rows)}
    if "train" not in tables:
        raise UserError(f"{samples.source}: no image is in the split train; name the images to learn from so")
    tables["train"] = replace(tables["train"], notes=notes + tables["train"].notes)
    return Published(tables["train"], tables.get("val"), tables.get("test"))


def _part(samples: SampleTable, name: str, rows: Rows, settings: DataSettings) -> SampleTable:
    part = samples.take(rows)
    keep = settings.keep_unlabelled_train if name == "train" else settings.keep_unlabelled_eval
    labelled = (part.targets == PRESENT).any(1)
    note = f"{name}: {len(part)} images, {np.count_nonzero(~labelled)} without a label {'kept' if keep else 'dropped'}"
    part = part if keep else part.take(np.flatnonzero(labelled))
    return replace(part, source=f"{name} of {samples.source}", notes=(note,))


def _huggingface(settings: DataSettings) -> Published:
    root = _place(settings, "the folder of the data set (--data.root DIR or URI)")
    tables = read_huggingface(
        root, label_names=_label_names(settings), image_column=settings.image_column, label_column=settings.label_column
    )
    return _published(tables, settings)


def _webdataset(settings: DataSettings) -> Published:
    root = _place(settings, "the folder of the data set (--data.root DIR or URI)")
    return _published(
        read_webdataset(root, label_names=_label_names(settings), label_field=settings.label_column), settings
    )


def _published(tables: dict[str, SampleTable], settings: DataSettings) -> Published:
    """By the names that a data set gives its splits: without test, val is held out; without both, a part of train by seed."""
    train, val, test = (tables.get(name) for name in ("train", "val", "test"))
    assert train is not None
    if test is not None:
        return Published(train, val, test)
    return (
        Published(train, None, val) if val is not None else _held_out_by_seed(train, settings, settings.test_fraction)
    )


READERS: dict[Dataset, Callable[[DataSettings], Published]] = {
    "scenes": _scenes,
    "coco": _coco,
    "voc": _voc,
    "nuswide": _nuswide,
    "apparel": _apparel,
    "manifest": _manifest,
    "folders": _folders,
    "huggingface": _huggingface,
    "webdataset": _webdataset,
}


def fingerprint(*tables: SampleTable) -> str:
    """sha256 of label names, image ids and targets; where the files lie makes no difference."""
    digest = hashlib.sha256()
    for table in tables:
        digest.update("\n".join(table.label_names).encode())
        for start in range(0, len(table), 65_536):
            block = table.table["image_id"].slice(start, 65_536).to_pylist()
            digest.update(("\n" * bool(start) + "\n".join(block)).encode())
        digest.update(table.targets.data)
    return digest.hexdigest()
