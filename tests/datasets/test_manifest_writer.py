"""What `msrn convert` writes, a manifest reads back equal."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from msrn_ray.datasets.manifest import read_manifest
from msrn_ray.datasets.manifest_writer import write_manifest
from msrn_ray.datasets.split_names import SPLITS, SplitName
from msrn_ray.errors import UserError
from msrn_ray.io.storage import Location
from msrn_ray.types import SampleTable
from tests.datasets.manifest_files import make

NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp", "Zs", "Cf")) | st.just(" "),
    min_size=1,
    max_size=6,
)


@st.composite
def label_tables(draw: st.DrawFn) -> tuple[list[str], npt.NDArray[np.int8], list[SplitName]]:
    """Return labels, targets and the split of each image; one image at least has a label."""
    names = draw(st.lists(NAMES.map(str.strip).filter(bool), min_size=1, max_size=4, unique=True))
    row = st.lists(st.sampled_from([1, 0, -1]), min_size=len(names), max_size=len(names))
    rows = draw(st.lists(row, min_size=1, max_size=6))
    rows[0][0] = 1
    splits: list[SplitName] = [
        "train",
        *draw(st.lists(st.sampled_from(SPLITS), min_size=len(rows) - 1, max_size=len(rows) - 1)),
    ]
    return names, np.array(rows, np.int8), splits


@settings(max_examples=150, deadline=None)
@given(label_tables())
@example((["dining table", "a;b", "[x]"], np.array([[1, 0, 1], [0, 1, -1]], np.int8), ["train", "test"]))
@example((["0", "1"], np.array([[1, 1], [0, 1]], np.int8), ["train", "train"]))
@example((["car"], np.array([[1], [-1]], np.int8), ["train", "train"]))
@example((["a b", "c d"], np.array([[1, 0], [-1, 1]], np.int8), ["train", "val"]))
def test_written_tables_read_back_equal(table: tuple[list[str], npt.NDArray[np.int8], list[SplitName]]) -> None:
    names, targets, splits = table
    uris = [f"s3://b/{row}.jpg" for row in range(len(targets))]
    tables = {}
    for split in dict.fromkeys(splits):
        rows = [row for row, own in enumerate(splits) if own == split]
        tables[split] = SampleTable.from_columns(
            [uris[row] for row in rows], [uris[row] for row in rows], targets[rows], tuple(names), "x"
        )
    with TemporaryDirectory() as folder:
        place = Location.of(Path(folder) / "labels.csv")
        write_manifest(tables, place)
        images = read_manifest(place, label_names=names)
    assert images.samples.label_names == tuple(names)
    read = dict(zip(images.samples.table["uri"].to_pylist(), images.samples.targets.tolist(), strict=True))
    assert read == dict(zip(uris, targets.tolist(), strict=True))
    if images.split is not None:
        found = dict(zip(images.samples.table["uri"].to_pylist(), images.split.tolist(), strict=True))
        assert found == {uri: SPLITS.index(split) for uri, split in zip(uris, splits, strict=True)}
    else:
        assert {*splits} == {"train"}


def test_label_both_present_and_unknown_is_refused(tmp_path: Path) -> None:
    text = "image,labels,unknown\ns3://b/1.jpg,cup;car,\ns3://b/2.jpg,cup,car;cup\n"
    with pytest.raises(UserError, match=r"row 2: a label is both present and in 'unknown'"):
        read_manifest(make(tmp_path, text))
    samples = read_manifest(make(tmp_path, text.replace("car;cup", "car"))).samples
    assert samples.targets.tolist() == [[1, 1], [-1, 1]]
    assert "labels.csv: 1 labels are unknown (column 'unknown')" in samples.notes
