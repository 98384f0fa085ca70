"""Splits by the names of container files, and the folder suggested for a wrong level."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from msrn_ray.datasets.containers import by_split, split_of
from msrn_ray.datasets.huggingface import read_huggingface
from msrn_ray.datasets.webdataset import read_webdataset
from msrn_ray.errors import UserError
from msrn_ray.io.storage import Location
from tests.datasets.container_files import (
    LABELS,
    arrow_table,
    save_dictionary,
    write_tar,
)


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("data/validation-0.tar", "val"),
        ("VAL/0001.tar", "val"),
        ("dev.tar", "val"),
        ("valid_3.tar", "val"),
        ("test2017/a.tar", "test"),
        ("training.tar", "train"),
        ("tests/a.tar", None),
        ("part-train.tar", None),
    ],
)
def test_splits_by_name(path: str, split: str | None) -> None:
    assert split_of(path) == split


def test_files_by_split() -> None:
    root = Location.of("/set")
    assert by_split(root, ["a.tar", "b.tar"]) == {"train": ["a.tar", "b.tar"]}
    assert by_split(root, ["test.tar", "train/b.tar"]) == {"test": ["test.tar"], "train": ["train/b.tar"]}
    with pytest.raises(UserError, match=r"the name extra\.tar gives no split, but other names do; begin"):
        by_split(root, ["train.tar", "extra.tar"])
    with pytest.raises(UserError, match="no file of the train split"):
        by_split(root, ["val.tar"])


@pytest.mark.parametrize("given", [".", "saved/images"])
def test_wrong_folder_level_gets_a_suggestion(tmp_path: Path, given: str) -> None:
    (tmp_path / "saved/images").mkdir(parents=True)
    save_dictionary(tmp_path / "saved", train=arrow_table(pa.array(LABELS), None))
    with pytest.raises(UserError, match=rf"\(did you mean {tmp_path}/saved\?\)$"):
        read_huggingface(Location.of(tmp_path / given))
    write_tar(tmp_path / "saved/a.tar", {})
    with pytest.raises(UserError, match=rf"holds no \.tar.*\(did you mean {tmp_path}/saved\?\)$"):
        read_webdataset(Location.of(tmp_path / "saved/images"))
