"""The doctor finds and names problems planted in a sound data set; a sound data set has no finding above info."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from msrn_ray.config import ExperimentConfig
from msrn_ray.datasets.protocol import load_splits
from msrn_ray.doctor.diagnosis import all_samples, diagnose
from msrn_ray.doctor.finding import DatasetFacts, LabelFacts
from msrn_ray.doctor.report import summary_line
from msrn_ray.ray_data import inspect_images as inspection
from msrn_ray.ray_data.inspect_images import inspect_rows
from msrn_ray.training.inputs import label_counts
from tests.doctor.coco_set import HELD_OUT, TRAIN, above_info, config, diagnosis_of, only, photo
from tests.tiny import make_coco


def test_a_sound_set_has_no_warning(root: Path) -> None:
    diagnosis = diagnosis_of(root)
    assert above_info(diagnosis.findings) == []
    train, val, test = diagnosis.splits
    assert (train.name, train.num_images, train.num_unlabelled, train.num_unreadable) == ("train", 23, 0, 0)
    assert train.present.tolist() == [10, 11, 10]
    assert train.labels_per_image.tolist() == [0, 15, 8]
    assert train.mean_labels == pytest.approx(31 / 23)
    assert (val.num_images, test.num_images) == (4, 4)
    assert train.num_bytes == sum(path.stat().st_size for path in (root / "train2014").iterdir())
    assert dict(diagnosis.sizes)["width, pixels"] == (48, 48, 48, 48, 48)
    assert diagnosis.pairs[0] == ("apple", "bench", 6, 0.6)
    assert {name: Path(image.uri).name for name, image in diagnosis.examples.items()} == {
        "apple": "train_000.jpg",
        "bench": "train_000.jpg",
        "cat": "train_013.jpg",
    }


def test_graph_at_several_tau(root: Path) -> None:
    diagnosis = diagnosis_of(root, model__tau=0.58)
    edges = {row.tau: (row.num_edges, row.mean_degree, row.num_alone) for row in diagnosis.taus}
    # P(apple | bench) = 6/11, P(bench | apple) = 6/10, P(bench | cat) = 2/10, P(cat | bench) = 2/11
    assert edges[0.1] == (4, pytest.approx(4 / 3), 0)
    assert edges[0.2] == (3, 1, 0)
    assert edges[0.5] == (2, pytest.approx(2 / 3), 1)
    assert edges[0.58] == (1, pytest.approx(1 / 3), 1)
    assert edges[0.7] == (0, 0, 3)
    assert diagnosis.tau == 0.58


def test_copies_in_two_splits(root: Path) -> None:
    shutil.copy(photo(root, "train", 3), photo(root, "val", 3))
    shutil.copy(photo(root, "train", 3), photo(root, "test", 3))
    shutil.copy(photo(root, "train", 20), photo(root, "test", 2))
    finding = only(diagnosis_of(root).findings)
    assert finding.severity == "error"
    assert finding.title == "2 images in more than one split (train and val: 1, train and test: 2, val and test: 1)"
    assert finding.details == (
        f"train: {photo(root, 'train', 3)} = val: {photo(root, 'val', 3)} = test: {photo(root, 'test', 3)}",
        f"train: {photo(root, 'train', 20)} = test: {photo(root, 'test', 2)}",
    )
    assert [Path(image.uri).name for image in finding.images][:3] == ["train_003.jpg", "val_003.jpg", "test_003.jpg"]
    assert "keep each image in one split" in finding.fix


def test_copies_in_one_split(root: Path) -> None:
    shutil.copy(photo(root, "train", 0), photo(root, "train", 1))
    shutil.copy(photo(root, "train", 0), photo(root, "train", 2))
    finding = only(diagnosis_of(root).findings)
    assert (finding.severity, finding.title) == (
        "warning",
        "1 image more than once in the same split, 2 copies too many",
    )
    assert all(f"train_00{row}.jpg" in finding.details[0] for row in range(3))


def test_long_lists_of_copies_are_cut_with_a_count(tmp_path: Path) -> None:
    rows = TRAIN + [[0]] * 15
    root = make_coco(tmp_path / "set", {"train": rows, "val": [[0]] * 20, "test": HELD_OUT})
    for row in range(23, 38):
        shutil.copy(photo(root, "train", 6), photo(root, "train", row))
    many = next(finding for finding in diagnosis_of(root).findings if "more than once" in finding.title)
    assert many.title == "1 image more than once in the same split, 15 copies too many"
    assert many.details[0].endswith(f"train: {photo(root, 'train', 33)} = ... and 4 more")
    for row in range(14):
        shutil.copy(photo(root, "train", row), photo(root, "val", row))
    leak = diagnosis_of(root).findings[0]
    assert leak.title.startswith("14 images in more than one split (train and val: 14)")
    assert len(leak.details) == 13
    assert leak.details[-1] == "... and 2 more"
    assert len(leak.images) == 12


def test_copies_with_different_labels(root: Path) -> None:
    shutil.copy(photo(root, "train", 0), photo(root, "train", 8))
    finding = only(diagnosis_of(root).findings)
    assert finding.title == "1 image more than once with different labels"
    assert "train_000.jpg = " in finding.details[0]
    assert "train_008.jpg" in finding.details[0]


def test_unreadable_files(root: Path) -> None:
    photo(root, "train", 5).write_bytes(photo(root, "train", 5).read_bytes()[:300])
    photo(root, "test", 1).write_bytes(b"")
    photo(root, "test", 2).write_bytes(b"")  # unreadable files are no copies
    in_train, in_test = above_info(diagnosis_of(root).findings)
    assert in_train.severity == "error"
    assert in_train.title == "1 image of train cannot be read (4.35%)"
    assert in_train.details == (f"{photo(root, 'train', 5)} (the image data is broken or cut off)",)
    assert "more than data.max_bad_fraction=0.01 allows, training would stop" in in_train.fix
    assert in_test.title == "2 images of test cannot be read (50.00%)"
    assert "the file is empty" in in_test.details[0]
    assert {finding.severity for finding in above_info(diagnosis_of(root, data__max_bad_fraction=0.5).findings)} == {
        "warning"
    }
    assert [split.num_unreadable for split in diagnosis_of(root).splits] == [1, 0, 2]
    all_too_large = diagnosis_of(root, data__max_pixels=48 * 40 - 1)
    assert all(split.num_unreadable == split.num_images for split in all_too_large.splits)
    assert (all_too_large.sizes, all_too_large.examples) == ((), {})


def test_labels_without_an_image(tmp_path: Path) -> None:
    held_out = [[0], [1], [2]]
    root = make_coco(
        tmp_path / "set", {"train": TRAIN, "val": held_out, "test": [*held_out, [3]]}, ["apple", "bench", "cat", "dog"]
    )
    in_train, in_val = above_info(diagnosis_of(root).findings)
    assert (in_train.title, in_train.details) == ("1 label without an image in train", ("dog",))
    assert "cannot be learnt" in in_train.fix
    assert (in_val.title, in_val.details) == ("1 label without an image in val", ("dog",))


def test_labels_that_always_occur_together(tmp_path: Path) -> None:
    rows = [[0, 1, 2]] * 5 + [[2, 3]] * 4 + [[2]] * 3
    root = make_coco(tmp_path / "set", {"train": rows, "val": rows, "test": rows}, ["apple", "bench", "cat", "dog"])
    titles = {finding.title: finding for finding in diagnosis_of(root).findings if "split" not in finding.title}
    assert titles["1 pair of labels that always occur together"].severity == "warning"
    assert titles["1 pair of labels that always occur together"].details == ("apple = bench (5 images)",)
    assert titles["1 label on every train image where known"].details == ("cat",)
    assert titles["2 labels never without another"].details == (
        "apple -> cat (5 images)",
        "bench -> cat (5 images)",
    ), "dog with 4 images may be a coincidence"


def test_labels_on_every_image_of_a_small_split(tmp_path: Path) -> None:
    root = make_coco(tmp_path / "set", {"train": TRAIN, "val": [[0, 1, 2], [0, 1], [0, 2]], "test": HELD_OUT})
    finding = only(diagnosis_of(root).findings)
    assert (finding.severity, finding.title) == ("warning", "1 label on every val image where known")
    assert finding.details == ("apple",)
    assert "left out of mAP" in finding.fix


def test_label_names_are_compared(tmp_path: Path) -> None:
    names = ["Cat", "cat", "nan"]
    root = make_coco(tmp_path / "set", {"train": TRAIN, "val": HELD_OUT, "test": HELD_OUT}, names)
    spelling, nothing = above_info(diagnosis_of(root).findings)
    assert spelling.details == ("'Cat' (14 images), 'cat' (15 images): case",)
    assert nothing.details == ("'nan' (12 images)",)


def test_images_without_a_label(root: Path, tmp_path: Path, without_ray: None) -> None:
    other = make_coco(tmp_path / "other", {"train": [*TRAIN, []], "val": [*HELD_OUT, []], "test": HELD_OUT})
    findings = inspection.diagnose_data(config(other)).findings
    in_val = only(findings)
    assert (in_val.severity, in_val.title) == ("warning", "1 image of val without a label (20.00%)")
    assert in_val.details == (str(photo(other, "val", 4)),)
    (dropped,) = [finding for finding in findings if "left out" in finding.title]
    assert dropped.title == "1 image left out (no label)"
    assert dropped.details == (str(photo(other, "train", 23)),)
    assert dropped.images[0].uri == str(photo(other, "train", 23))
    kept = inspection.diagnose_data(config(other, data__keep_unlabelled_train=True)).findings
    assert not any("left out" in finding.title for finding in kept)
    assert any(finding.title == "1 image of train without a label (4.17%)" for finding in kept)
    assert not any("without a label" in finding.title for finding in inspection.diagnose_data(config(root)).findings)


def test_unknown_labels_are_not_missing_labels(shared: Path) -> None:
    diagnosis = diagnosis_of(shared / "data/voc_mini", data__dataset="voc", protocol="paper")
    train = diagnosis.splits[0]
    assert train.unknown.sum() > 0
    assert train.num_unlabelled == 0, "12 photos show only difficult objects"
    assert any("unknown (-1): train " in finding.title for finding in diagnosis.findings)


def test_sizes(root: Path) -> None:
    Image.new("RGB", (9, 7)).save(photo(root, "val", 1))
    Image.new("RGB", (400, 90)).save(photo(root, "val", 2))
    diagnosis = diagnosis_of(root)
    tiny = only(diagnosis.findings)
    assert tiny.title == "1 image enlarged more than 8 times (short side below 8 pixels)"
    assert tiny.details == (f"{photo(root, 'val', 1)}",)
    titles = [finding.title for finding in diagnosis.findings]
    assert "1 image at least 4 times as long as wide" in titles
    assert any("smaller than the network's input" in title for title in titles)
    width = dict(diagnosis.sizes)["width, pixels"]
    assert (width[0], width[2], width[4]) == (9, 48, 400)


def test_rare_and_uneven_labels(tmp_path: Path) -> None:
    rows = [[0, 1], *[[0]] * 109, *[[1]] * 2, [2]]
    root = make_coco(tmp_path / "set", {"train": rows, "val": HELD_OUT, "test": HELD_OUT})
    findings = diagnosis_of(root, model__tau="auto").findings
    assert above_info(findings) == []
    titles = {finding.title: finding.details for finding in findings}
    assert titles["2 labels with fewer than 10 train images"] == ("cat (1), bench (3)",)
    assert "uneven labels: apple is 110 times as frequent as cat" in titles


def test_an_empty_and_a_dense_graph(root: Path, tmp_path: Path) -> None:
    empty = only(diagnosis_of(root, model__tau=0.9).findings)
    assert empty.title == "the label graph is empty at tau 0.9: every label attends to itself alone"
    assert empty.fix == "take --model.tau auto (here 0.2)"
    dense = diagnosis_of(root, model__tau=0.1).findings
    assert any("dense at tau 0.1: 4 of 6 possible edges" in finding.title for finding in dense)
    alone = make_coco(tmp_path / "alone", {name: [[0], [1], [2]] for name in ("train", "val", "test")})
    assert "no two labels occur together" in only(diagnosis_of(alone).findings).fix


def test_labels_without_a_word_vector(tmp_path: Path, without_ray: None) -> None:
    root = make_coco(tmp_path / "set", {"train": TRAIN, "val": HELD_OUT, "test": HELD_OUT}, ["apple", "bench", "qzxv"])
    finding = only(inspection.diagnose_data(config(root)).findings)
    assert (finding.severity, finding.details) == ("error", ("qzxv",))
    assert "--data.word-vectors learned" in finding.fix
    assert above_info(inspection.diagnose_data(config(root, data__missing_words="zero")).findings) == []
    assert above_info(inspection.diagnose_data(config(root, data__word_vectors="learned")).findings) == []


def test_most_severe_come_first_in_any_order_of_facts(root: Path) -> None:
    shutil.copy(photo(root, "train", 0), photo(root, "train", 1))
    shutil.copy(photo(root, "train", 20), photo(root, "test", 2))
    settings = config(root)
    splits = load_splits(settings)
    counts = label_counts(splits.train, None)
    facts = inspect_rows(all_samples(splits), 0, 31, 10**6)
    shuffled = facts.take(pa.array(np.random.default_rng(0).permutation(31)))
    labels = LabelFacts(counts, counts)
    first, second = (diagnose(splits, images, settings, labels) for images in (facts, shuffled))
    assert first.findings == second.findings
    severities = [finding.severity for finding in first.findings]
    assert severities[:2] == ["error", "warning"]
    assert set(severities[2:]) <= {"info"}
    assert summary_line(first).startswith("findings: 1 error, 1 warning, ")


def test_photographs_of_coco(shared: Path) -> None:
    """All photographs are sound and none is in two splits; the counts are those that the fixtures' README gives."""
    diagnosis = diagnosis_of(shared / "data/coco_mini", protocol="paper", data__keep_unlabelled_train=True)
    train, val = diagnosis.splits
    assert (train.num_images, train.num_unlabelled, train.num_unreadable) == (178, 3, 0)
    assert (val.num_images, val.num_unlabelled, val.num_unreadable) == (114, 2, 0)
    assert train.mean_labels == pytest.approx(3.18, abs=0.005)
    assert [finding.title for finding in above_info(diagnosis.findings)] == [
        "4 labels without an image in train",
        "11 labels without an image in val",
        "1 pair of labels that always occur together",
    ]


def test_a_part_of_a_file_is_shown_by_its_id() -> None:
    samples = pa.table({"image_id": ["7", "8"], "uri": ["/a.parquet#bytes=4+5", "/b.jpg"]})
    dataset = DatasetFacts(ExperimentConfig(), ("train",), (), samples, np.array([0]), samples, ())
    assert [(image.caption, image.uri) for image in dataset.show(np.array([0, 1]))] == [
        ("train: 7", "/a.parquet#bytes=4+5"),
        ("train: /b.jpg", "/b.jpg"),
    ]
