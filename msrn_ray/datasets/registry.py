"""The registry of readers: what `data.*` asks for becomes the splits that a data set comes with."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Dataset, DataSettings
from ..errors import UserError
from ..io.storage import Location
from ..types import PRESENT, SampleTable
from .apparel import read_apparel
from .coco import find_year, has_split, read_coco
from .folders import read_folders
from .huggingface import read_huggingface
from .manifest import OwnImages, read_manifest
from .nuswide import read_nuswide
from .prepared import BAD_FILE, PreparedInfo, read_info, read_prepared
from .scenes.generate import generate_scenes
from .stratify import SPLITS, stratified_split
from .text_files import read_label_names, unlabelled_note
from .voc import Difficult, find_voc, read_voc
from .webdataset import read_webdataset

# Settings of tensors, words and protocol, the seed among them; of a list of labels the names are kept, not where it lay
_NOT_OF_READERS = {
    *("dataset", "root", "image_size", "crop_scales", "flip", "max_pixels", "max_bad_fraction"),
    *("word_vectors", "missing_words", "label_counts", "val_fraction", "split_seed", "labels"),
}


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
    published = READERS[settings.dataset](settings)
    _require_same_labels(published)
    return published


def reader_settings(settings: DataSettings) -> dict[str, Any]:
    """The settings that decide what a reader gives, by name; the others count when a prepared data set is read, too."""
    return settings.model_dump(mode="json", exclude=_NOT_OF_READERS)


def _require_same_labels(published: Published) -> None:
    train = published.train
    for name, table in (("val", published.val), ("test", published.held_out)):
        if table is not None and table.label_names != train.label_names:
            differ = sorted(set(table.label_names) ^ set(train.label_names))
            raise UserError(
                f"{name} split ({table.source}): its labels are not those of train ({train.source}): only one has"
                f" {', '.join(differ[:5])}; use files of the same labels"
            )


def _prepared(root: Location, info: PreparedInfo, settings: DataSettings) -> Published:
    tables = read_prepared(root, info)
    now = reader_settings(settings)
    notes = [f"read from prepared shards ({info.dataset}, {info.content[:12]}): {root}"]
    notes += [
        f"{name}: {split.bad_images} images that could not be read are not in the shards ({BAD_FILE})"
        for name, split in info.splits.items()
        if split.bad_images
    ]
    notes += [
        f"data.{name} was {value!r} when the data was prepared and stays so; {now[name]!r} has no effect"
        for name, value in info.settings.items()
        if now.get(name) not in (None, value)
    ]
    train = replace(tables["train"], notes=(*notes, *tables["train"].notes))
    return Published(train, tables.get("val"), tables.get("test"))


def _root(settings: DataSettings, what: str | None = None) -> Location:
    if settings.root is None:
        wanted = what or f"the folder of the {settings.dataset} data set (--data.root DIR or URI)"
        raise UserError(f"data.root is needed: {wanted}")
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
    samples = read_apparel(_root(settings), single_labels=settings.apparel_single_labels)
    rest, part = stratified_split(samples.targets, settings.apparel_test_fraction, settings.split_seed)
    test = replace(samples.take(part), source=f"{len(part)} images by seed {settings.split_seed}", notes=())
    return Published(samples.take(rest), None, test)


def _manifest(settings: DataSettings) -> Published:
    images = read_manifest(
        _root(settings, "the file of the manifest (--data.root FILE)"),
        image_column=settings.image_column,
        label_column=settings.label_column,
        label_separator=settings.label_separator,
        label_names=_label_names(settings),
        missing_images=settings.missing_images,
    )
    return _own_data(_by_split(images), settings)


def _folders(settings: DataSettings) -> Published:
    root = _root(settings, "the folder that holds a folder for each label (--data.root DIR)")
    return _own_data(_by_split(read_folders(root, label_names=_label_names(settings))), settings)


def _huggingface(settings: DataSettings) -> Published:
    tables = read_huggingface(
        _root(settings),
        label_names=_label_names(settings),
        image_column=settings.image_column,
        label_column=settings.label_column,
    )
    return _own_data(tables, settings)


def _webdataset(settings: DataSettings) -> Published:
    tables = read_webdataset(_root(settings), label_names=_label_names(settings), label_field=settings.label_column)
    return _own_data(tables, settings)


def _label_names(settings: DataSettings) -> tuple[str, ...] | None:
    return None if settings.labels is None else read_label_names(Location.of(settings.labels))


def _by_split(images: OwnImages) -> dict[str, SampleTable]:
    if images.split is None:
        return {"train": images.samples}
    rows = {name: np.flatnonzero(images.split == position) for position, name in enumerate(SPLITS)}
    return {name: images.samples.take(part) for name, part in rows.items() if len(part)}


def _own_data(tables: dict[str, SampleTable], settings: DataSettings) -> Published:
    """Splits are what the data set calls them; where all of it is train, a part of that is test, by seed."""
    source, notes = next((table.source, table.notes) for table in tables.values())
    if "train" not in tables:
        raise UserError(f"{source}: no image is in the split train; name the images to learn from so")
    if len(tables) == 1 and settings.test_fraction:
        whole = tables["train"]
        rest, part = stratified_split(whole.targets, settings.test_fraction, settings.split_seed)
        if not len(rest):
            raise UserError(
                f"{source}: data.test_fraction={settings.test_fraction} of {len(whole)} images leaves none to learn from;"
                " add images or lower it"
            )
        tables = {"train": whole.take(rest), "test": whole.take(part)}
        drawn = f"data.test_fraction={settings.test_fraction}, data.split_seed={settings.split_seed}"
        notes += (f"no splits are named: test is drawn ({drawn})",)
    kept = {name: _without_unlabelled(table, name, settings) for name, table in tables.items() if len(table)}
    train = replace(kept["train"], notes=notes + kept["train"].notes)
    return Published(train, kept.get("val"), kept.get("test"))


def _without_unlabelled(samples: SampleTable, name: str, settings: DataSettings) -> SampleTable:
    keep = settings.keep_unlabelled_train if name == "train" else settings.keep_unlabelled_eval
    labelled = (samples.targets == PRESENT).any(1)
    note = unlabelled_note(name, labelled, keep)
    samples = samples if keep else samples.take(np.flatnonzero(labelled))
    return replace(samples, source=f"{name} of {samples.source}", notes=(note,))


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
