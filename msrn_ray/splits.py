"""Which images are train, val and test: the registry of readers and the protocol."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .config import Dataset, DataSettings, ExperimentConfig
from .datasets.apparel import read_apparel
from .datasets.coco import find_year, has_split, read_coco
from .datasets.nuswide import read_nuswide
from .datasets.scenes import generate_scenes
from .datasets.split import stratified_split
from .datasets.voc import Difficult, find_voc, read_voc
from .errors import UserError
from .storage import Location
from .types import SampleTable


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
    published = READERS[config.data.dataset](config.data)
    train, held_out = published.train, published.held_out
    notes = [*train.notes, *(published.val.notes if published.val else ()), *held_out.notes]
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
        if table is not None and table.label_names != splits.train.label_names:
            differ = sorted(set(table.label_names) ^ set(splits.train.label_names))
            raise UserError(
                f"{name} split ({table.source}): its labels are not those of train ({splits.train.source}): only one has"
                f" {', '.join(differ[:5])}; use files of the same labels"
            )
        if table is not None and not (table.targets == 1).any():
            raise UserError(f"{name} split ({table.source}): no image has a label, nothing to learn or to score")
    return splits


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
    rest, part = stratified_split(table.targets, settings.apparel_test_fraction, settings.split_seed)
    test = table.take(part)
    return Published(
        table.take(rest),
        None,
        SampleTable(test.table, test.label_names, f"{len(part)} images by seed {settings.split_seed}"),
    )


READERS: dict[Dataset, Callable[[DataSettings], Published]] = {
    "scenes": _scenes,
    "coco": _coco,
    "voc": _voc,
    "nuswide": _nuswide,
    "apparel": _apparel,
}


def fingerprint(*tables: SampleTable) -> str:
    """sha256 of label names, image ids and targets; where the files lie makes no difference."""
    digest = hashlib.sha256()
    for table in tables:
        digest.update("\n".join(table.label_names).encode())
        digest.update("\n".join(table.table["image_id"].to_pylist()).encode())
        digest.update(table.targets.tobytes())
    return digest.hexdigest()
