"""Data named instead of a preset, and `msrn convert`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from msrn_ray.cli.app import main
from msrn_ray.cli.named_data import name_data
from msrn_ray.data_settings import DataSettings
from msrn_ray.datasets.registry import PublishedSplits, read_published
from msrn_ray.errors import UserError
from tests.tiny import make_coco, make_photo


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """Run the command in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["msrn", *argv])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def labels_of(published: PublishedSplits) -> dict[str, tuple[str, list[int]]]:
    """Return the split and the target of each image by its URI."""
    found = {}
    for split, table in (("train", published.train), ("val", published.val), ("test", published.held_out)):
        if table is not None:
            for uri, target in zip(table.table["uri"].to_pylist(), table.targets.tolist(), strict=True):
                found[uri] = (split, target)
    return found


def test_path_becomes_preset_and_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        make_photo(tmp_path / "pets" / label / "a.jpg")
    pets = str(tmp_path / "pets")
    assert name_data(["train", pets, "--train.epochs", "2"]) == [
        "train",
        "folders",
        "--data.root",
        pets,
        "--train.epochs",
        "2",
    ]
    assert capsys.readouterr().out == f"{pets}: read as folders, because it holds folders of images (cat, dog)\n"
    with pytest.raises(UserError, match="is no preset"):
        name_data(["doctor", f"{pets}/nowhere"])


@pytest.mark.parametrize(
    "argv", [[], ["train"], ["train", "scenes"], ["train", "--config", "x"], ["predict", "a/b"], ["train", "coco2015"]]
)
def test_other_command_lines_stay(argv: list[str]) -> None:
    assert name_data(argv) == argv


def test_converted_data_set_reads_back_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_coco(tmp_path / "coco", {"train": [[0, 1], [], [2]], "val": [[1], [0, 2]]})
    out = tmp_path / "out" / "labels.csv"
    out.parent.mkdir()
    assert run(monkeypatch, "convert", str(root), "--out", str(out)) == 0
    printed = capsys.readouterr().out
    names = out.with_suffix(".labels.txt")
    assert f"train on it with: msrn train manifest --data.root {out} --data.labels {names}" in printed
    everything = {"keep_unlabelled_train": True, "keep_unlabelled_eval": True}
    before = read_published(DataSettings.model_validate({"dataset": "coco", "root": str(root)} | everything))
    after = read_published(
        DataSettings.model_validate({"dataset": "manifest", "root": str(out), "labels": str(names)} | everything)
    )
    assert before.train.label_names == after.train.label_names
    assert labels_of(before) == labels_of(after)
    assert {split for split, _ in labels_of(after).values()} == {"train", "test"}
    assert run(monkeypatch, "convert", str(root), "--out", str(out.with_suffix(".txt"))) == 2
    assert "--out" in capsys.readouterr().err
