"""The registry of readers: turns the settings `data.*` into the splits that a data set publishes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..data_settings import Dataset, DataSettings
from ..errors import UserError
from ..io.storage import Location
from ..types import SampleTable
from .annotation_formats import read_annotation_file
from .annotations import build_images
from .apparel import read_apparel
from .coco import find_year, has_split, read_coco
from .folders import read_folders
from .groups import require_groups
from .huggingface import read_huggingface
from .image_uris import select_rows
from .label_values import ValueMeaning
from .manifest import NamedColumns, read_manifest
from .manifest_splits import find_split_files, join_split_files, read_split_lists, tables_by_split
from .merge_labels import LabelMerge, none_notes, plan_merge, plan_none
from .nuswide import read_nuswide
from .openimages import is_openimages, read_openimages
from .prepared import BAD_IMAGES_FILE, PreparedInfo, read_info, read_prepared
from .scenes.generate import generate_scenes
from .split_names import SplitName
from .stratify import split_off, stratified_split
from .text_files import read_label_names
from .voc import Difficult, find_voc, read_voc
from .webdataset import read_webdataset

# Settings of tensors, word vectors, protocol and seed; and `labels`, `merge_labels`: a prepared data set stores the names, not a path.
_NOT_READER_SETTINGS = {
    *("dataset", "root", "image_size", "crop_scales", "flip", "max_pixels", "max_bad_fraction"),
    *("word_vectors", "missing_words", "label_counts", "val_fraction", "split_seed", "labels", "merge_labels"),
}


@dataclass(frozen=True)
class PublishedSplits:
    """The splits that a data set publishes.

    Attributes:
        train: the images to train on.
        val: None if it has to be split off from train.
        held_out: the images to score; None if there are none, which only custom images may leave out.
    """

    train: SampleTable
    val: SampleTable | None
    held_out: SampleTable | None

    @property
    def tables(self) -> dict[SplitName, SampleTable]:
        """Return the splits that exist, by name; the images to score are `test`."""
        found: dict[SplitName, SampleTable | None] = {"train": self.train, "val": self.val, "test": self.held_out}
        return {name: table for name, table in found.items() if table is not None}


def read_published(settings: DataSettings) -> PublishedSplits:
    """Read the published splits. If `data.root` holds a prepared data set, `data.dataset` has no effect.

    Raises:
        UserError: if the data set has any fault; the message names the file and the fix.
    """
    root = None if settings.root is None else Location.of(settings.root)
    info = None if root is None else read_info(root)
    if root is not None and info is not None:
        published = _read_prepared_splits(root, info, settings)
    else:
        published = READERS[settings.dataset](settings)
        _require_same_labels(published)
    require_groups(published.tables, settings.group_column)
    return _change_labels(published, settings)


def reader_settings(settings: DataSettings) -> dict[str, Any]:
    """Return the settings, by name, that decide what a reader returns. `msrn prepare` fixes them; all others stay free."""
    return settings.model_dump(mode="json", exclude=_NOT_READER_SETTINGS)


def _change_labels(published: PublishedSplits, settings: DataSettings) -> PublishedSplits:
    """Leave out the labels that mean none, and join those of `data.merge_labels`."""
    train, val, held_out = published.train, published.val, published.held_out
    changes: list[Callable[[Sequence[str]], LabelMerge]] = []
    if settings.none_values is not None:
        changes.append(partial(plan_none, settings.none_values))
    if settings.merge_labels is not None:
        changes.append(partial(plan_merge, Location.of(settings.merge_labels)))
    for plan in changes:
        change = plan(train.label_names)
        train = replace(change.apply(train), notes=(*train.notes, change.note))
        val, held_out = (None if table is None else change.apply(table) for table in (val, held_out))
    return PublishedSplits(replace(train, notes=(*train.notes, *none_notes(train.label_names))), val, held_out)


def _require_same_labels(published: PublishedSplits) -> None:
    train = published.train
    for name, table in (("val", published.val), ("test", published.held_out)):
        if table is not None and table.label_names != train.label_names:
            different = sorted(set(table.label_names) ^ set(train.label_names))
            raise UserError(
                f"{name} split ({table.source}): its labels differ from those of train ({train.source}): only one of them has"
                f" {', '.join(different[:5])}; use files with the same labels"
            )


def _read_prepared_splits(root: Location, info: PreparedInfo, settings: DataSettings) -> PublishedSplits:
    tables = read_prepared(root, info)
    requested = reader_settings(settings)
    notes = [f"read from prepared shards ({info.dataset}, {info.content[:12]}): {root}"]
    notes += [
        f"{name}: {split.bad_images} images that could not be read are not in the shards ({BAD_IMAGES_FILE})"
        for name, split in info.splits.items()
        if split.bad_images
    ]
    notes += [
        f"data.{name} was {value!r} when the data was prepared and stays so; {requested[name]!r} has no effect"
        for name, value in info.settings.items()
        if requested.get(name) not in (None, value)
    ]
    train = replace(tables["train"], notes=(*notes, *tables["train"].notes))
    return PublishedSplits(train, tables.get("val"), tables.get("test"))


def _root(settings: DataSettings, description: str | None = None) -> Location:
    if settings.root is None:
        wanted = description or f"the folder of the {settings.dataset} data set (--data.root DIR or URI)"
        raise UserError(f"data.root is needed: {wanted}")
    return Location.of(settings.root)


def default_scenes_root() -> Path:
    """Return the folder of the embedded data set, in the user's cache folder (XDG_CACHE_HOME or ~/.cache)."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "msrn_ray" / "scenes"


def _scenes(settings: DataSettings) -> PublishedSplits:
    root = _root(settings) if settings.root else Location.of(default_scenes_root())
    if not root.is_local:
        raise UserError(
            f"data.root {root}: scenes are generated into a folder on this machine; read a copy elsewhere with --data.dataset coco"
        )
    return _coco(settings.model_copy(update={"root": str(generate_scenes(Path(str(root))))}))


def _coco(settings: DataSettings) -> PublishedSplits:
    root = _root(settings)
    year = find_year(root, "train", settings.year)  # one year for all splits: val2014 and train2017 share images
    read = partial(read_coco, root, crowd=settings.crowd, year=year, missing_images=settings.missing_images)
    train = read("train", keep_unlabelled=settings.keep_unlabelled_train)
    val = read("val", keep_unlabelled=settings.keep_unlabelled_eval)
    # COCO publishes no test labels; another data set in its layout may have them
    if has_split(root, "test", year):
        return PublishedSplits(train, val, read("test", keep_unlabelled=settings.keep_unlabelled_eval))
    return PublishedSplits(train, None, val)


def _voc(settings: DataSettings) -> PublishedSplits:
    base = find_voc(_root(settings), settings.year)
    # VOC2012 publishes no labels of its test split
    train, test = ("train", "val") if base.name == "VOC2012" else ("trainval", "test")
    difficult = settings.voc_difficult
    policies: tuple[Difficult, Difficult] = (
        ("positive", "ignore") if difficult == "reference" else (difficult, difficult)
    )
    read = partial(read_voc, base, missing_images=settings.missing_images)
    return PublishedSplits(read(train, difficult=policies[0]), None, read(test, difficult=policies[1]))


def _nuswide(settings: DataSettings) -> PublishedSplits:
    read = partial(
        read_nuswide,
        _root(settings),
        form=settings.nuswide_form,
        concepts=settings.concepts,
        missing_images=settings.missing_images,
    )
    train = read("Train", keep_unlabelled=settings.keep_unlabelled_train)
    return PublishedSplits(train, None, read("Test", keep_unlabelled=settings.keep_unlabelled_eval))


def _apparel(settings: DataSettings) -> PublishedSplits:
    samples = read_apparel(_root(settings), single_labels=settings.apparel_single_labels)
    rest, part = stratified_split(samples.targets, settings.apparel_test_fraction, settings.split_seed)
    test = replace(samples.take(part), source=f"{len(part)} images by seed {settings.split_seed}", notes=())
    return PublishedSplits(samples.take(rest), None, test)


def _manifest(settings: DataSettings) -> PublishedSplits:
    root = _root(settings, "the file of the manifest (--data.root FILE)")
    exported = read_annotation_file(root)
    if exported is not None:
        images = build_images(root, exported, _label_names(settings), settings.missing_images)
        return _custom_splits(tables_by_split(images), settings)
    if is_openimages(root):
        images = read_openimages(root, _label_names(settings), settings.missing_images)
        return _custom_splits(tables_by_split(images), settings)
    files, notes = find_split_files(root)
    options: dict[str, Any] = {
        "named": NamedColumns(settings.image_column, settings.label_column, settings.group_column),
        "label_separator": settings.label_separator,
        "label_names": _label_names(settings),
        "missing_images": settings.missing_images,
        "meaning": ValueMeaning(settings.present_values, settings.absent_values, settings.unknown_values),
    }
    images = read_manifest(root, **options)
    if images.split is None and len(files) > 1:
        parts = {split: read_manifest(file, **options).samples for split, file in files.items()}
        return _custom_splits(join_split_files(parts), settings)
    if images.split is None:
        split, list_notes = read_split_lists(root, images.samples)
        images, notes = images._replace(split=split), notes + list_notes
    else:
        notes += tuple(f"{file}: not read, for {root.name} has a column of splits" for file in [*files.values()][1:])
    samples = replace(images.samples, notes=(*images.samples.notes, *notes))
    return _custom_splits(tables_by_split(images._replace(samples=samples)), settings)


def _folders(settings: DataSettings) -> PublishedSplits:
    root = _root(settings, "the folder that holds one folder per label (--data.root DIR)")
    return _custom_splits(tables_by_split(read_folders(root, label_names=_label_names(settings))), settings)


def _huggingface(settings: DataSettings) -> PublishedSplits:
    tables = read_huggingface(
        _root(settings),
        label_names=_label_names(settings),
        image_column=settings.image_column,
        label_column=settings.label_column,
        group_column=settings.group_column,
        label_separator=settings.label_separator,
    )
    return _custom_splits(tables, settings)


def _webdataset(settings: DataSettings) -> PublishedSplits:
    tables = read_webdataset(
        _root(settings),
        label_names=_label_names(settings),
        label_field=settings.label_column,
        label_separator=settings.label_separator,
    )
    return _custom_splits(tables, settings)


def _label_names(settings: DataSettings) -> tuple[str, ...] | None:
    return None if settings.labels is None else read_label_names(Location.of(settings.labels))


def _custom_splits(tables: dict[SplitName, SampleTable], settings: DataSettings) -> PublishedSplits:
    """Return the splits that a custom data set names. If it names none, draw test from all images by seed."""
    source, notes = next((table.source, table.notes) for table in tables.values())
    if "train" not in tables:
        raise UserError(f"{source}: no image is in the split train; put the images to train on in it")
    if len(tables) == 1 and settings.test_fraction:
        whole = tables["train"]
        rest, part = split_off(whole, settings.test_fraction, settings.split_seed)
        if not len(rest):
            raise UserError(
                f"{source}: data.test_fraction={settings.test_fraction} of {len(whole)} images leaves none to train on;"
                " add images or lower it"
            )
        tables = {"train": whole.take(rest), "test": whole.take(part)}
        drawn = f"data.test_fraction={settings.test_fraction}, data.split_seed={settings.split_seed}"
        if whole.groups is not None:
            drawn += f", {len(part)} of {len(whole)} images in whole groups of {settings.group_column!r}"
        notes += (f"no splits are named: test is drawn ({drawn})",)
    kept = {name: _drop_unlabelled(table, name, settings) for name, table in tables.items() if len(table)}
    train = replace(kept["train"], notes=notes + kept["train"].notes)
    return PublishedSplits(train, kept.get("val"), kept.get("test"))


def _drop_unlabelled(samples: SampleTable, name: SplitName, settings: DataSettings) -> SampleTable:
    keep = settings.keep_unlabelled_train if name == "train" else settings.keep_unlabelled_eval
    return replace(select_rows(samples, name, keep), source=f"{name} of {samples.source}")


READERS: dict[Dataset, Callable[[DataSettings], PublishedSplits]] = {
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
