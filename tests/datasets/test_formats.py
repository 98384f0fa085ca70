"""Label files as people have them: each data set is read as its truth says, or refused with the words that it needs.

Each folder holds the command that a person types, and the truth: the labels of each image, and its split.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from msrn_ray.cli.app import COMMANDS
from msrn_ray.cli.parser import parse
from msrn_ray.data_settings import DataSettings
from msrn_ray.datasets.registry import PublishedSplits, read_published
from msrn_ray.doctor.label_names import twins_and_nothings
from msrn_ray.errors import UserError
from tests.conftest import SHARED

FORMATS = SHARED / "data" / "formats"
CASES = sorted(path.name for path in FORMATS.iterdir() if (path / "cmd").is_file()) if FORMATS.is_dir() else []

# Data without a certain reading: a pattern that the error must match, for the cause and the fix
REFUSED = {
    "A06_celeba_csv": r"no cell .* is 0, and 227 are -1.*--data\.absent-values -1",
    "A08_movie_posters": r"is a list in text; leave out --data\.label-separator",
    "A24_yolo": r"YOLO",
    "B02_multihot_text": r"a flag per label, by position\?.*--data\.labels FILE",
    "B17_sep_hint_line": r"line 1: 'sep=;' names no columns; delete",
    "B18_decimal_comma": r"decimal comma",
    "B23_x_marks": r"--data\.present-values x.*--data\.absent-values",
    "B25_counts": r"a count.*--data\.present-values",
    "B30_odir": r"a flag per label, by position\?.*--data\.labels FILE",
    "B39_windows_absolute": r"absolute Windows path of another machine",
    "B42_twice_rows": r"is in rows 1 and 2",
    "B48_csv_gz": r"is compressed; unpack it",
    "B49_xlsx": r"is a spreadsheet; save the sheet as 'CSV UTF-8'",
    "B52_jsonl_ids_with_names": r"label '0' is not among .* write the names",
    "B53_jsonl_dict": r"column 'labels' holds struct",
    "B56_jsonl_list_of_dicts": r"column 'labels' holds struct",
    "D35_all_empty": r"no row has a label",
    "D44_folders_masks": r"images/ beside masks/",
    "D52_coco_windows_path": r"absolute Windows paths",
    "E07_column_called_classes": r"--data\.label-column classes",
    "E08_column_called_class": r"--data\.label-column class",
    "E09_header_missing": r"first line .* must name the columns",
    "F03_wds_dots_in_names": r"ends at the first dot",
    "F07_voc_flat": r"Pascal VOC annotations per image",
    "G10_paddle_multihot": r"a flag per label, by position\?.*--data\.labels FILE",
    "G13_comment_first": r"line 1: '# exported .* delete the lines above",
    "G17_label1_label2": r"seem to hold one label each",
}
# Labels that may be one label, or none: read as written, and the doctor or a note says it with this pattern
SAID = {
    "A03_nih": r"'No Finding' is a word for none",
    "B10_nan_for_none": r"'nan' is a word for none",
    "B32_case_space": r"differ in spelling alone",
    "B34_inner_spaces": r"differ in spelling alone",
    "B35_singular_typo": r"singular and plural",
}
PENDING = {
    "A21_cvat_coco": "no reader of a COCO file without the names of the benchmark",
    "A25_imet_ids": "no reader of numbers with a file of names",
    "B47_txt_file": "the data set lacks its file",
    "D40_symlinks": "the links of the data set are files",
}


def settings_of(case: str) -> DataSettings:
    """Return the data settings of the command that a person types."""
    command = parse(COMMANDS, shlex.split((FORMATS / case / "cmd").read_text(encoding="utf-8"))[1:])
    settings: DataSettings = getattr(command, "experiment", command).data
    return settings.model_copy(update={"keep_unlabelled_train": True, "keep_unlabelled_eval": True})


def differences(published: PublishedSplits, truth: dict[str, Any]) -> list[str]:
    """Return the images whose labels or split differ from the truth, or that are missing. Case and outer blanks do not count."""
    found = {}
    for split, table in published.tables.items():
        ids, uris = table.table["image_id"].to_pylist(), table.table["uri"].to_pylist()
        for image_id, uri, target in zip(ids, uris, table.targets.tolist(), strict=True):
            named = [
                {table.label_names[at] for at, value in enumerate(target) if value == wanted} for wanted in (1, -1)
            ]
            # a sample's id may begin with its tar
            name = image_id if image_id in truth["images"] else Path(image_id).name
            found[Path(uri).name if truth["key"] == "basename" else name] = (*map(plain, named), split)
    is_drawn = any("test is drawn" in note for note in published.train.notes)
    wrong = sorted(found.keys() ^ truth["images"].keys())
    for image, expected in truth["images"].items():
        if image in found:
            present, unknown, split = found[image]
            wanted_split = expected.get("split")
            if present != plain(expected["labels"]) or unknown != plain(expected.get("unknown", ())):
                wrong.append(f"{image}: {sorted(present)}")
            elif wanted_split and (is_drawn or split != wanted_split):
                wrong.append(f"{image}: {split}")
    return wrong


def plain(labels: Any) -> set[str]:
    return {label.strip().casefold() for label in labels}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.xfail(reason=PENDING[case], strict=True) if case in PENDING else ())
        for case in CASES
    ],
)
def test_labels_are_read_as_the_truth_says(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FORMATS / case)
    if case in REFUSED:
        with pytest.raises(UserError, match=REFUSED[case]):
            read_published(settings_of(case))
        return
    published = read_published(settings_of(case))
    if case in SAID:
        train = published.train
        counts = (train.targets == 1).sum(0).tolist()
        said = [*train.notes, *(finding.title for finding in twins_and_nothings(train.label_names, counts))]
        assert any(re.search(SAID[case], line) for line in said), said
        return
    truth = FORMATS / case / "truth.json"
    if truth.is_file():
        assert differences(published, json.loads(truth.read_text(encoding="utf-8"))) == []
    else:
        assert len(published.train) > 0


@pytest.mark.skipif(not CASES, reason="the folder 'shared' with label files is not beside the project")
def test_misreading_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = "A18_vertex_csv"
    monkeypatch.chdir(FORMATS / case)
    truth = json.loads((FORMATS / case / "truth.json").read_text(encoding="utf-8"))
    published = read_published(settings_of(case))
    first, second, third = list(truth["images"])[:3]
    truth["images"][first]["labels"][0] = "zebra"
    truth["images"][second]["split"] = "test"
    del truth["images"][third]
    assert [line.split(":")[0] for line in differences(published, truth)] == [third, first, second]
