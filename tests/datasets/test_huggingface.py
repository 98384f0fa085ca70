"""Arrow and Parquet files of Hugging Face: images are read in place, with the labels and splits of the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msrn_ray.config import ExperimentConfig
from msrn_ray.data_settings import DataSettings
from msrn_ray.datasets.huggingface import read_huggingface
from msrn_ray.datasets.protocol import load_splits
from msrn_ray.datasets.registry import read_published
from msrn_ray.datasets.webdataset import read_webdataset
from msrn_ray.errors import UserError
from msrn_ray.io.storage import Location
from tests.datasets.container_files import (
    CLASSES,
    LABELS,
    NAMES,
    TARGETS,
    arrow_table,
    numbers,
    picture,
    save_dictionary,
    save_to_disk,
    targets_and_images,
)


def test_huggingface_rows_of_arrow_files(tmp_path: Path) -> None:
    root = save_dictionary(
        tmp_path / "saved",
        train=arrow_table(numbers(), CLASSES),
        validation=arrow_table(numbers([3]), CLASSES, [3]),
        test=arrow_table(numbers([4, 2]), CLASSES, [4, 2]),
    )
    tables = read_huggingface(Location.of(root))
    assert list(tables) == ["train", "val", "test"]
    order = [1, 2, 0]  # that of the features
    for split, rows in (("train", [0, 1, 2, 3, 4]), ("val", [3]), ("test", [4, 2])):
        assert tables[split].label_names == ("owl", "cat", "dog")
        targets = np.array(TARGETS)[rows][:, [2, 0, 1]].tolist()
        assert targets_and_images(tables[split]) == (targets, [picture(row) for row in rows]), order
    assert tables["train"].table["image_id"].to_pylist() == [f"train/{row:08}" for row in range(5)]
    assert "#bytes=" in tables["train"].table["uri"][0].as_py()


def test_huggingface_remote_folder_with_one_split(tmp_path: Path) -> None:
    root = save_to_disk(tmp_path / "saved", arrow_table(numbers(), CLASSES))
    remote = Location.of(f"memory://{tmp_path.name}-saved")
    for path in root.iterdir():
        (remote / path.name).write_bytes(path.read_bytes())
    tables = [read_huggingface(place)["train"] for place in (Location.of(root), remote)]
    assert targets_and_images(tables[0]) == targets_and_images(tables[1])
    published = read_published(DataSettings(dataset="huggingface", root=str(root), test_fraction=0.25))
    assert published.held_out is not None
    assert (len(published.train), len(published.held_out)) == (4, 1)
    assert read_published(DataSettings(dataset="huggingface", root=str(root), test_fraction=0)).held_out is None


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_huggingface_rows_of_parquet_files(tmp_path: Path, compression: str) -> None:
    (tmp_path / "data").mkdir()
    for name, rows in (
        ("train-00000-of-00002", [0, 1, 2]),
        ("train-00001-of-00002", [3, 4]),
        ("validation-00000-of-00001", [2]),
    ):
        table = arrow_table(numbers(rows), CLASSES, rows)
        pq.write_table(table, tmp_path / f"data/{name}.parquet", row_group_size=2, compression=compression)
    tables = read_huggingface(Location.of(tmp_path), label_names=NAMES)
    assert tables["train"].label_names == NAMES
    assert targets_and_images(tables["train"]) == (TARGETS, [picture(row) for row in range(5)])
    assert targets_and_images(tables["val"]) == (TARGETS[2:3], [picture(2)])
    notes = load_splits(ExperimentConfig(data=DataSettings(dataset="huggingface", root=str(tmp_path)))).notes
    assert any("`msrn prepare` them first" in line for line in notes)


def test_huggingface_labels_as_text_single_numbers_and_nested(tmp_path: Path) -> None:
    text = arrow_table(pa.array(LABELS), None, image_id=[10, 11, 12, 13, 14])
    table = read_huggingface(Location.of(save_to_disk(tmp_path / "text", text)))["train"]
    assert (table.label_names, table.targets.tolist()) == (NAMES, TARGETS)
    assert table.table["image_id"].to_pylist() == ["10", "11", "12", "13", "14"]

    single = arrow_table(pa.array([0, 2, -1, None, 1], pa.int64()), {"names": list(NAMES), "_type": "ClassLabel"})
    table = read_huggingface(Location.of(save_to_disk(tmp_path / "single", single)))["train"]
    assert table.targets.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 1, 0]]

    plain = arrow_table(numbers(), None)
    table = read_huggingface(Location.of(save_to_disk(tmp_path / "plain", plain)), label_names=("owl", "cat", "dog"))[
        "train"
    ]
    assert table.targets[:, [1, 2, 0]].tolist() == TARGETS

    objects = pa.StructArray.from_arrays([numbers(), pa.array([[]] * 5, pa.list_(pa.float32()))], ["category", "area"])
    features = {
        "image": {"_type": "Image"},
        "objects": {"feature": {"category": CLASSES["feature"]}, "_type": "Sequence"},
    }
    nested = arrow_table(numbers(), None).drop_columns("labels").append_column("objects", objects)
    nested = nested.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    root = Location.of(save_to_disk(tmp_path / "nested", nested))
    table = read_huggingface(root, label_column="objects.category")["train"]
    assert table.targets[:, [1, 2, 0]].tolist() == TARGETS


@pytest.mark.parametrize("kind", [pa.int64(), pa.bool_()])
def test_huggingface_flags_by_position(tmp_path: Path, kind: pa.DataType) -> None:
    flags = pa.array(TARGETS, pa.list_(pa.int64())).cast(pa.list_(kind))
    root = save_to_disk(tmp_path / "saved", arrow_table(flags, None))
    table = read_huggingface(Location.of(root), label_names=NAMES)["train"]
    assert table.targets.tolist() == TARGETS
    assert "5 lists of 3 flags" in table.notes[0]
    with pytest.raises(UserError, match=r"flags.*there are 4 label names"):
        read_huggingface(Location.of(root), label_names=(*NAMES, "ant"))


def test_huggingface_texts_are_split(tmp_path: Path) -> None:
    texts = pa.array([", ".join(labels) for labels in LABELS])
    table = read_huggingface(Location.of(save_to_disk(tmp_path / "saved", arrow_table(texts, None))))["train"]
    assert (table.label_names, table.targets.tolist()) == (NAMES, TARGETS)
    assert "labels separated by ','" in table.notes[0]


def test_huggingface_column_per_label(tmp_path: Path) -> None:
    columns = {name: pa.array([bool(row[at]) for row in TARGETS]) for at, name in enumerate(NAMES)}
    rows = arrow_table(pa.array(LABELS), None, **columns).drop_columns("labels")
    root = Location.of(save_to_disk(tmp_path / "saved", rows))
    table = read_huggingface(root)["train"]
    assert (table.label_names, table.targets.tolist()) == (NAMES, TARGETS)
    renamed = rows.rename_columns(["image", "cat", "dog", "is_valid"])
    with pytest.raises(UserError, match="'is_valid' is named like a split"):
        read_huggingface(Location.of(save_to_disk(tmp_path / "other", renamed)))


def test_imagefolder_keeps_its_splits(tmp_path: Path) -> None:
    for split, rows in (("train", [0, 2]), ("validation", [3]), ("test", [4])):
        (tmp_path / split).mkdir()
        for row in rows:
            (tmp_path / split / f"{row}.jpg").write_bytes(picture(row))
        lines = [json.dumps({"file_name": f"{row}.jpg", "labels": LABELS[row]}) for row in rows]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
    tables = read_huggingface(Location.of(tmp_path))
    assert {split: table.targets.tolist() for split, table in tables.items()} == {
        "train": [TARGETS[0], TARGETS[2]],
        "val": [TARGETS[3]],
        "test": [TARGETS[4]],
    }


TWO_IMAGES = pa.table({"a": [b"x"], "b": [b"y"], "labels": [["cat"]]})


@pytest.mark.parametrize(
    ("table", "given", "match"),
    [
        (arrow_table(numbers(), None), {}, r"labels holds numbers without names; .*data\.labels"),
        (arrow_table(numbers(), None), {"label_names": ("a",)}, r"labels holds 2, but there are 1 names \(0 to 0\)"),
        (arrow_table(pa.array(LABELS), None), {"label_names": ("cat", "dog")}, r"image train/00000002 has the label 'owl'.*data\.labels"),
        (arrow_table(pa.array([1.5] * 5), None), {}, r"labels is double; it must hold a label or a list of labels"),
        (arrow_table(pa.array(LABELS), None, tags=["a"] * 5), {}, r"2 columns may hold the label; name one of .*data\.label_column"),
        (arrow_table(pa.array(LABELS), None), {"label_column": "tag"}, r"no label column 'tag'; name one of image\.bytes, .*labels"),
        (arrow_table(pa.array(LABELS), None), {"image_column": "photo"}, r"no image column 'photo'.*data\.image_column"),
        (TWO_IMAGES, {}, r"0 columns may hold the image; name one"),
        (arrow_table(pa.array(LABELS), None, id=[1, 1, 2, 3, 4]), {}, r"image id '1' 2 times"),
    ],
)  # fmt: skip
def test_huggingface_ambiguous_columns_are_refused(
    tmp_path: Path, table: pa.Table, given: dict[str, Any], match: str
) -> None:
    with pytest.raises(UserError, match=match):
        read_huggingface(Location.of(save_to_disk(tmp_path / "saved", table)), **given)


def test_huggingface_broken_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no dataset_dict\.json, state\.json or \.parquet"):
        read_huggingface(Location.of(tmp_path))
    for read in (read_huggingface, read_webdataset):
        with pytest.raises(UserError, match=r"nowhere: no such folder; give the folder"):
            read(Location.of(tmp_path / "nowhere"))
    root = save_to_disk(tmp_path / "saved", arrow_table(pa.array(LABELS), None))
    state = json.loads((root / "state.json").read_text())
    for change, match in (
        ({"_indices_data_files": [{"filename": "x"}]}, "call flatten_indices"),
        ({"_data_files": None}, "has no list of _data_files"),
        ({"_data_files": [{"filename": "../data.arrow"}]}, "leads out of the folder"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, r"gone\.arrow: cannot be read"),
    ):
        (root / "state.json").write_text(json.dumps(state | change))
        with pytest.raises(UserError, match=match):
            read_huggingface(Location.of(root))
    (root / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json: damaged \(.*; save the data set again"):
        read_huggingface(Location.of(root))
    (root / "state.json").write_text(json.dumps(state))
    (file,) = root.glob("*.arrow")
    whole = file.read_bytes()
    for content in (whole[:3000], whole[:-8], b"", b"no Arrow file"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"\.arrow: c(ut off|annot be read)"):
            read_huggingface(Location.of(root))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "extra"]}')
    with pytest.raises(UserError, match="splits must be called train, val or test"):
        read_huggingface(Location.of(tmp_path))


def test_huggingface_missing_image_bytes_are_refused(tmp_path: Path) -> None:
    table = arrow_table(pa.array(LABELS), None)
    images = pa.array([{"bytes": None, "path": "a.jpg"}] * 5, table.schema.field("image").type)
    root = save_to_disk(tmp_path / "paths", table.set_column(0, "image", images))
    with pytest.raises(UserError, match=r"row 0 of a batch has no image\.bytes, perhaps only a path"):
        read_huggingface(Location.of(root))
    (tmp_path / "parquet").mkdir()
    pq.write_table(table.set_column(0, "image", images), tmp_path / "parquet/train.parquet")
    with pytest.raises(UserError, match=r"row 0 of a batch has no image\.bytes, perhaps only a path"):
        read_huggingface(Location.of(tmp_path / "parquet"))
    root = save_to_disk(tmp_path / "packed", table)
    (file,) = root.glob("*.arrow")
    with pa.OSFile(str(file), "wb") as sink:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(sink, table.schema, options=options) as stream:
            stream.write_table(table)
    with pytest.raises(UserError, match="buffers are compressed"):
        read_huggingface(Location.of(root))


def test_huggingface_missing_ids_are_refused(tmp_path: Path) -> None:
    table = pa.table({"image": [picture(0), picture(1)], "label": ["a", "b"], "image_id": ["x", None]})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(UserError, match="row 1 of a batch has no image_id; fill it in"):
        read_huggingface(Location.of(tmp_path))


def test_huggingface_invalid_text_is_refused(tmp_path: Path) -> None:
    labels = pa.array([b"\xff", b"b"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"image": [picture(0), picture(1)], "label": labels}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"train\.parquet: cannot be read \(.*UTF8"):
        read_huggingface(Location.of(tmp_path))


def test_huggingface_lists_beyond_the_file_are_refused(tmp_path: Path) -> None:
    ends = pa.py_buffer(np.array([0, 2**30, 2], np.int32))
    labels = pa.Array.from_buffers(pa.list_(pa.string()), 2, [None, ends], children=[pa.array(["a", "b"])])
    save_to_disk(tmp_path / "saved", pa.table({"image": [picture(0), picture(1)], "labels": labels}))
    with pytest.raises(UserError, match=r"\.arrow: cannot be read"):
        read_huggingface(Location.of(tmp_path / "saved"))


def test_huggingface_blank_labels_are_dropped(tmp_path: Path) -> None:
    labels = [["cat", " cat", ""], ["owl "], [None, " "]]
    pq.write_table(pa.table({"image": [picture(row) for row in range(3)], "labels": labels}), tmp_path / "a.parquet")
    (table,) = read_huggingface(Location.of(tmp_path)).values()
    assert table.label_names == ("cat", "owl")
    assert table.targets.tolist() == [[1, 0], [0, 1], [0, 0]]
