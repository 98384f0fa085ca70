"""Which images an evaluation scores when the data set has changed since the run; no Ray."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from msrn_ray.config import ExperimentConfig
from msrn_ray.datasets.protocol import load_splits
from msrn_ray.errors import UserError
from msrn_ray.runs.checkpoint import Checkpoint
from msrn_ray.runs.resume import describe_data
from msrn_ray.runs.scored_images import Request, ScoredImages, choose_images
from msrn_ray.runs.split_file import SPLIT_FILE, RecordedSplits, load_splits_of, save_splits
from msrn_ray.training.inputs import label_counts
from msrn_ray.types import SampleTable
from tests.tiny import make_coco, make_photo

WORDS = ("cat", "dog", "cat;dog")


def write_manifest(root: Path, labels: Mapping[str, str]) -> Path:
    """Write a manifest and its images; labels: image name -> label list."""
    root.mkdir(exist_ok=True)
    for name in labels:
        if not (root / name).exists():
            make_photo(root / name)
    with (root / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "labels"), *labels.items()])
    return root / "labels.csv"


class Run:
    """A run on a data set: its config, its checkpoint without weights, and what it recorded."""

    def __init__(self, config: ExperimentConfig) -> None:
        self.config = config
        splits = load_splits(config)
        self.ids = {name: ids_of(table) for name, table in splits.tables.items()}
        names = splits.train.label_names
        counts = label_counts(splits.train, None)
        self.checkpoint = Checkpoint(config, names, counts, {}, (0.5,) * len(names), {}, epoch=1)
        tables = {name: table.table for name, table in splits.tables.items()}
        self.recorded = RecordedSplits(tables, names, describe_data(splits, config)["fingerprint"])

    def choose(self, split: str, allow: bool = False, **changes: Any) -> ScoredImages:
        """Return what is scored under changed settings."""
        config = self.config.with_overrides({name.replace("__", "."): value for name, value in changes.items()})
        return choose_images(Request(config, split, allow), self.checkpoint, self.recorded)


def ids_of(table: SampleTable) -> set[str]:
    return set(table.table["image_id"].to_pylist())


@pytest.fixture
def labels() -> dict[str, str]:
    return {f"image_{number:03}.jpg": WORDS[number % 3] for number in range(60)}


@pytest.fixture
def run(tmp_path: Path, labels: dict[str, str]) -> Run:
    root = write_manifest(tmp_path / "pets", labels)
    overrides = {"data.dataset": "manifest", "data.root": str(root), "data.test_fraction": 0.2}
    return Run(ExperimentConfig().with_overrides(overrides))


def test_recorded_splits_are_read_back(run: Run, tmp_path: Path) -> None:
    assert load_splits_of(tmp_path / "epoch_1" / "model.pt") is None
    save_splits(tmp_path, run.recorded)
    read = load_splits_of(tmp_path / "epoch_1" / "model.pt")
    assert read is not None
    assert (read.label_names, read.fingerprint) == (run.recorded.label_names, run.recorded.fingerprint)
    assert {name: table.to_pylist() for name, table in read.tables.items()} == {
        name: table.to_pylist() for name, table in run.recorded.tables.items()
    }
    assert str(pq.read_schema(tmp_path / SPLIT_FILE).field("target").type) == "fixed_size_list<element: int8>[2]"


@pytest.mark.parametrize("content", [b"", b"PAR1 cut off"])
def test_damaged_split_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SPLIT_FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"split\.parquet: damaged"):
        load_splits_of(tmp_path / "model.pt")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_unchanged_data_score_the_recorded_split(run: Run, split: str) -> None:
    images = run.choose(split)
    assert ids_of(images.table) == run.ids[split]
    assert images.num_trained == (len(images.table) if split == "train" else 0)


@pytest.mark.parametrize("split", ["val", "test"])
def test_appended_rows_leave_the_recorded_split(run: Run, labels: dict[str, str], split: str) -> None:
    new = {f"new_{number}.jpg": WORDS[number % 3] for number in range(5)}
    write_manifest(Path(str(run.config.data.root)).parent, labels | new)
    assert ids_of(load_splits(run.config).tables[split]) & run.ids["train"], "the split is drawn anew"
    images = run.choose(split)
    assert ids_of(images.table) == run.ids[split]
    assert "new: 5 images that the run did not know are left out" in " ".join(images.notes)
    assert all(name in " ".join(images.notes) for name in new)


def test_gone_and_relabelled_images_are_named(run: Run, labels: dict[str, str]) -> None:
    first, second, third = sorted(run.ids["test"])[:3]
    changed = labels | {second: "dog" if labels[second] == "cat" else "cat", third: ""}
    del changed[first]
    write_manifest(Path(str(run.config.data.root)).parent, changed)
    images = run.choose("test")
    assert ids_of(images.table) == run.ids["test"] - {first}
    notes = " ".join(images.notes)
    assert f"gone: 1 of {len(run.ids['test'])} recorded test images ({first})" in notes
    assert f"relabelled: 2 images are scored with the labels that they have now ({second}, {third})" in notes
    assert not images.table.targets[images.table.table["image_id"].to_pylist().index(third)].any()


def test_redrawn_split_with_train_images_is_refused(run: Run) -> None:
    """A larger test part takes images that the run trained on."""
    drawn = load_splits(run.config.with_overrides({"data.test_fraction": 0.5})).named("test")
    overlap = ids_of(drawn) & run.ids["train"]
    with pytest.raises(
        UserError, match=rf"trained on {len(overlap)} of its {len(drawn)} images.*--allow-train-images"
    ) as error:
        run.choose("test", data__test_fraction=0.5)
    assert any(name in str(error.value) for name in overlap)
    images = run.choose("test", allow=True, data__test_fraction=0.5)
    assert ids_of(images.table) == ids_of(drawn)
    assert images.num_trained == len(overlap)
    assert f"the run trained on {len(overlap)} of its {len(drawn)} images" in images.notes[-1]


def test_moved_and_changed_data_are_recognised(run: Run, labels: dict[str, str], tmp_path: Path) -> None:
    root = write_manifest(tmp_path / "moved", labels | {"new.jpg": "cat"})
    images = run.choose("test", data__root=str(root))
    assert ids_of(images.table) == run.ids["test"]
    assert all(uri.startswith(str(tmp_path / "moved")) for uri in images.table.table["uri"].to_pylist())


def test_other_data_are_scored_as_drawn(run: Run, tmp_path: Path) -> None:
    others = {f"other_{number}.jpg": WORDS[number % 3] for number in range(40)}
    root = write_manifest(tmp_path / "others", others)
    images = run.choose("test", data__root=str(root))
    assert ids_of(images.table) == ids_of(
        load_splits(run.config.with_overrides({"data.root": str(root)})).named("test")
    )
    assert images.num_trained == 0
    assert "holds no image that the run trained on" in images.notes[-1]


def test_train_images_among_other_data_are_refused(run: Run, labels: dict[str, str], tmp_path: Path) -> None:
    trained = sorted(run.ids["train"])[:9]
    root = write_manifest(
        tmp_path / "mixed", {name: labels[name] for name in trained} | {f"o{n}.jpg": WORDS[n % 3] for n in range(9)}
    )
    with pytest.raises(UserError, match=r"trained on \d of its 9 images"):
        run.choose("test", data__root=str(root), data__test_fraction=0.5)


def test_same_file_under_another_id_is_refused(run: Run) -> None:
    tables = dict(run.recorded.tables)
    names = [f"id {row}" for row in range(len(tables["train"]))]
    tables["train"] = tables["train"].set_column(0, "image_id", [names])
    run.recorded = replace(run.recorded, tables=tables)
    with pytest.raises(UserError, match="trained on"):
        run.choose("test", data__test_fraction=0.5)


def test_ids_that_splits_repeat_do_not_mix_them(tmp_path: Path) -> None:
    """Exports with a file per split count their images from 0 in each file."""
    rows = [[0], [1], [0, 1], [2], [0], [1]] * 3
    root = make_coco(tmp_path / "coco", {"train": rows, "val": rows[:9], "test": rows[:8]})
    for path in (root / "annotations").iterdir():
        text = path.read_text()
        for number in (1, 2, 3):
            text = text.replace(f'"id": {number}0', '"id": 90').replace(f'"image_id": {number}0', '"image_id": 90')
        path.write_text(text)
    run = Run(ExperimentConfig().with_overrides({"data.dataset": "coco", "data.root": str(root)}))
    assert run.ids["test"] <= run.ids["train"]
    assert run.choose("test").num_trained == 0
    (path,) = (root / "annotations").glob("*test*")
    path.write_text(path.read_text().replace('"category_id": 7}', '"category_id": 8}', 1))
    images = run.choose("test")
    assert len(images.table) == 8
    assert "relabelled: 1 images" in " ".join(images.notes)
    assert run.choose("test", data__split_seed=1).num_trained == 0


def test_new_export_that_repeats_ids_is_no_record(tmp_path: Path) -> None:
    """A second export draws other images into test and counts them from 0 as before."""
    root = make_coco(tmp_path / "coco", {"train": [[0], [1], [2]] * 4, "val": [[0], [1]], "test": [[0], [1]]})
    files = [root / "annotations" / f"instances_{split}2014.json" for split in ("train", "test")]
    files[1].write_text(files[1].read_text().replace(": 300", ": 100"))
    run = Run(ExperimentConfig().with_overrides({"data.dataset": "coco", "data.root": str(root)}))
    assert run.ids["test"] < run.ids["train"]
    for old, new in (("test_000", "train_000"), ("test_001", "train_001")):
        files[1].write_text(files[1].read_text().replace(old, new))
        (root / "train2014" / f"{new}.jpg").rename(root / "test2014" / f"{new}.jpg")
        (root / "test2014" / f"{old}.jpg").rename(root / "train2014" / f"{old}.jpg")
        files[0].write_text(files[0].read_text().replace(new, old))
    images = run.choose("test")
    names = {Path(uri).name for uri in images.table.table["uri"].to_pylist()}
    assert names == {"test_000.jpg", "test_001.jpg"}
    with pytest.raises(UserError, match="trained on 2 of its 2 images"):
        run.choose("test", data__split_seed=1)


def test_without_a_record_the_counts_tell(run: Run, labels: dict[str, str]) -> None:
    """The checkpoint's label counts know the fingerprint of their images; after a change it says nothing."""
    request = Request(run.config, "test")
    assert choose_images(request, run.checkpoint, None).num_trained == 0
    write_manifest(Path(str(run.config.data.root)).parent, labels | {"new.jpg": "cat"})
    images = choose_images(request, run.checkpoint, None)
    assert images.num_trained is None
    assert "test may hold images that the run trained on" in images.notes[-1]


def test_counts_without_a_source_tell_nothing(run: Run) -> None:
    counts = replace(run.checkpoint.counts, provenance=None)
    images = choose_images(Request(run.config, "test"), replace(run.checkpoint, counts=counts), None)
    assert images.num_trained is None


def test_large_split_file_is_small(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    targets = (generator.random((20_000, 80)) < 0.035).astype(np.int8)
    ids = [f"{number:012}" for number in generator.permutation(20_000)]
    table = SampleTable.from_columns(
        ids, [f"/data/train/{name}.jpg" for name in ids], targets, tuple(map(str, range(80))), ""
    )
    save_splits(tmp_path, RecordedSplits({"train": table.table}, table.label_names, ""))
    assert (tmp_path / SPLIT_FILE).stat().st_size < 1_000_000
