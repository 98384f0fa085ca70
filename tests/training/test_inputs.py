"""The training inputs gathered from the splits, and their description."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from msrn_ray.datasets.protocol import fingerprint, load_splits
from msrn_ray.errors import UserError
from msrn_ray.labels.graph import LabelCounts, count_labels, save_counts
from msrn_ray.training.inputs import describe_inputs, gather_inputs
from tests.datasets.test_protocol import HELD_OUT, TRAIN, config
from tests.tiny import CATEGORIES, make_coco


@pytest.fixture
def two_splits(tmp_path: Path) -> Path:
    """A data set with the splits that COCO publishes."""
    return make_coco(tmp_path / "two", {"train": TRAIN, "val": HELD_OUT})


def test_label_graph_is_counted_on_train_only(two_splits: Path) -> None:
    settings = config(two_splits, data__val_fraction=0.25)
    inputs = gather_inputs(settings)
    assert inputs.counts.names == CATEGORIES
    assert inputs.splits.test is not None
    train = inputs.splits.train.targets == 1
    np.testing.assert_array_equal(inputs.counts.count, train.sum(0))
    pairs = train.T.astype(int) @ train.astype(int)
    np.fill_diagonal(pairs, 0)
    np.testing.assert_array_equal(inputs.counts.cooccurrence, pairs)
    whole = count_labels(load_splits(config(two_splits, protocol="paper")).train.targets, CATEGORIES)
    assert (inputs.counts.count < whole.count).all(), "val must not leak into the graph"
    assert inputs.counts.cooccurrence[1, 2] == 0, "bench and cat meet only in the test split"
    assert inputs.word_vectors.shape == (3, 50)
    assert inputs.word_vectors.dtype == torch.float32


def test_frequency_ignores_unknown_labels(shared: Path) -> None:
    inputs = gather_inputs(config(shared / "data/voc_mini", data__dataset="voc", protocol="paper"))
    targets = inputs.splits.train.targets
    expected = [(np.count_nonzero(column == 1) + 1) / (np.count_nonzero(column != -1) + 2) for column in targets.T]
    assert inputs.frequency.dtype == torch.float32
    np.testing.assert_allclose(inputs.frequency.numpy(), expected, rtol=1e-6)
    sheep = inputs.counts.names.index("sheep")
    assert (targets[:, sheep] == 1).sum() == 0
    assert 0 < inputs.frequency[sheep] < 0.01
    unknown = (targets == -1).sum(0)
    assert unknown.max() > 0
    np.testing.assert_array_equal(inputs.counts.count, (targets == 1).sum(0))


def test_faults_are_found_before_training(two_splits: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"resnet11.*resnet10"):
        gather_inputs(config(two_splits, model__backbone="resnet11"))
    with pytest.raises(UserError, match=r"none\.pth: no such file"):
        gather_inputs(config(two_splits, model__pretrained=str(tmp_path / "none.pth")))
    with pytest.raises(UserError, match=r"none\.npz: no such file"):
        gather_inputs(config(two_splits, data__word_vectors=str(tmp_path / "none.npz")))


def test_description_names_splits_graph_and_empty_labels(tmp_path: Path) -> None:
    rows = [[0, 1], [0, 1], [0], [1]] * 3
    root = make_coco(tmp_path / "set", {"train": rows, "val": [[0], [2]], "test": [[1], [2]]})
    settings = config(root, model__tau=0.6)
    lines = list(describe_inputs(gather_inputs(settings), settings))
    assert "train2014: 12 of 12 images, 0 without a label dropped" in lines
    assert "coco: 3 labels, images: train 12, val 2, test 2" in lines
    assert "label graph at tau 0.6: 2 edges" in lines
    assert "train: no image with cat; training cannot learn them" in lines
    assert "val: no image with bench; their AP is nan and does not count in mAP" in lines
    assert "test: no image with apple; their AP is nan and does not count in mAP" in lines
    settings = config(root, model__tau=0.7, protocol="paper")
    lines = list(describe_inputs(gather_inputs(settings), settings))
    assert "coco: 3 labels, images: train 12, val 2" in lines
    assert any(
        "0 edges (each label attends only to itself; a lower model.tau, or auto, adds edges)" in line for line in lines
    )
    assert not any(line.startswith("test:") for line in lines)


def test_description_warns_of_labels_on_every_image(tmp_path: Path) -> None:
    rows = [[0, 1], [0], [0, 2]]
    root = make_coco(tmp_path / "set", {"train": rows * 3, "val": rows, "test": [[0, 1]]})
    settings = config(root)
    lines = list(describe_inputs(gather_inputs(settings), settings))
    assert "warning: train: every image with known apple has it; training has nothing to compare them with" in lines
    assert "val: every image with known apple has it; their AP is nan and does not count in mAP" in lines
    assert "val: mAP leaves out 1 of 3 labels" in lines
    assert "test: mAP leaves out 3 of 3 labels: it is nan" in lines


def test_batch_larger_than_train_is_a_warning(two_splits: Path) -> None:
    settings = config(two_splits, data__val_fraction=0.25)
    inputs = gather_inputs(settings)
    num_images = len(inputs.splits.train)
    for batch_size, warned in ((num_images, False), (num_images + 1, True)):
        changed = settings.with_overrides({"train.batch_size": batch_size})
        assert any("single step" in line for line in describe_inputs(inputs, changed)) == warned


def test_counts_from_a_file_replace_those_of_train(two_splits: Path, tmp_path: Path) -> None:
    settings = config(two_splits)
    counted = gather_inputs(settings)
    provenance, train = counted.counts.provenance, counted.splits.train
    assert provenance is not None
    assert (provenance.source, provenance.num_images) == (train.source, len(train))
    assert provenance.fingerprint == fingerprint(train)
    given = LabelCounts(CATEGORIES[::-1], np.array([[0, 3, 0], [3, 0, 0], [0, 0, 0]]), np.array([4, 9, 1]))
    save_counts(tmp_path / "counts.npz", given)
    settings = config(two_splits, data__label_counts=str(tmp_path / "counts.npz"))
    inputs = gather_inputs(settings)
    assert inputs.counts.names == CATEGORIES
    assert inputs.counts.count.tolist() == [1, 9, 4]
    lines = list(describe_inputs(inputs, settings))
    assert f"label graph from {tmp_path / 'counts.npz'}: the file names no source" in lines
    assert "label graph at tau 0.4: 1 edges" in lines
    save_counts(tmp_path / "counts.npz", LabelCounts(("a",), np.zeros((1, 1), np.int64), np.ones(1, np.int64)))
    with pytest.raises(UserError, match=r"counts\.npz: .*lacking: apple, bench, cat"):
        gather_inputs(settings)


def test_description_names_automatic_tau_and_missing_words(tmp_path: Path) -> None:
    rows = [[0, 1], [0, 1], [0], [1], [2]] * 3
    root = make_coco(tmp_path / "set", {"train": rows, "val": rows}, ["apple", "bench", "qzxv"])
    settings = config(root, model__tau="auto", model__tau_degree=0.5, data__missing_words="zero", protocol="paper")
    lines = list(describe_inputs(gather_inputs(settings), settings))
    assert "label graph at tau 0.6667 (auto): 2 edges" in lines
    assert "word vectors: zero for 1 labels not found: qzxv" in lines
    settings = settings.with_overrides({"data.word_vectors": "learned"})
    lines = list(describe_inputs(gather_inputs(settings), settings))
    assert "word vectors: 50 numbers per label, learned from a random start" in lines
    assert not any("not found" in line for line in lines)


def test_description_names_at_most_eight_empty_labels(shared: Path) -> None:
    settings = config(shared / "data/nuswide_mini", data__dataset="nuswide", protocol="paper")
    inputs = gather_inputs(settings)
    empty = np.count_nonzero(~(inputs.splits.train.targets == 1).any(0))
    (line,) = [line for line in describe_inputs(inputs, settings) if line.startswith("train: ")]
    assert f" and {empty - 8} more; training cannot learn them" in line
    assert line.count(", ") == 7
