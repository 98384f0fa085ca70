"""The inputs and outputs of `msrn predict`."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from msrn_ray.cli.app import main
from msrn_ray.errors import UserError
from msrn_ray.inference.predict_files import OUTPUTS, Prediction, expand_images, predict_images, write_predictions
from msrn_ray.inference.predictor import Predictor
from msrn_ray.io.byte_ranges import read_bytes
from msrn_ray.io.files import check_output
from msrn_ray.runs.checkpoint import load_checkpoint, save_checkpoint
from tests.tiny import make_photo, make_picture

BAD = {
    "header_only.jpg": "not an image",
    "huge_20000x20000.png": "more pixels",
    "text_named.jpg": "not an image",
    "truncated.jpg": "broken or cut off",
    "truncated.png": "broken or cut off",
    "zero_byte.jpg": "empty",
}


def tree(root: Path) -> Path:
    """Make images in two levels of folders, with suffixes in both cases, beside files and a folder that are no images."""
    for name in ("b.jpg", "a.PNG", "deep/er/c.JpEg", "deep/d.webp"):
        make_photo(root / name)
    for name in ("notes.txt", "deep/e.jpg.part"):
        (root / name).touch()
    (root / "folder.jpg").mkdir()
    return root


def test_expand_images_of_folders_files_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path / "root")
    everything = sorted(str(root / name) for name in ("b.jpg", "a.PNG", "deep/er/c.JpEg", "deep/d.webp"))
    assert expand_images([str(root)]) == everything
    assert expand_images([str(root / "b.jpg")]) == [str(root / "b.jpg")]
    assert expand_images([str(root / "notes.txt")]) == [str(root / "notes.txt")], (
        "an explicitly named file needs no image suffix"
    )
    assert expand_images([str(root / "*.jpg")]) == [str(root / "b.jpg")]
    assert expand_images([str(root / "**" / "*.[jJ]p*g")]) == [str(root / "b.jpg"), str(root / "deep/er/c.JpEg")]
    assert expand_images(["s3://bucket/*.jpg", "file:///x y.jpg"]) == ["s3://bucket/*.jpg", "file:///x y.jpg"]
    monkeypatch.setenv("HOME", str(root))
    assert expand_images(["~/b.jpg"]) == [str(root / "b.jpg")]
    monkeypatch.chdir(root)
    assert expand_images(["b.jpg", "./b.jpg", "*.jpg", "deep"]) == ["b.jpg", "deep/d.webp", "deep/er/c.JpEg"]
    assert expand_images(["deep", "b.jpg"])[-1] == "b.jpg", "inputs keep their order"


def test_name_with_pattern_characters_is_a_file_first(tmp_path: Path) -> None:
    path = make_photo(tmp_path / "holiday [1].jpg")
    assert expand_images([str(path)]) == [str(path)]


@pytest.mark.parametrize(
    ("name", "message"), [("none.jpg", "no such file"), ("*.tiff", "no file matches"), ("empty", "holds no image")]
)
def test_input_without_image_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        expand_images([str(make_photo(tmp_path / "a.jpg")), str(tmp_path / name)])
    assert str(tmp_path / name) in str(caught.value)


def test_read_bytes_of_paths_and_uris(tmp_path: Path) -> None:
    for name in ("plain.jpg", "with blank.jpg", "100%.jpg", "a%20b.jpg", "ümlaut #1?.jpg"):
        path = tmp_path / name
        path.write_bytes(name.encode())
        assert read_bytes(str(path)) == name.encode()
        assert read_bytes(f"file://{path}") == name.encode()
    for missing in (str(tmp_path / "none.jpg"), f"file://{tmp_path}/none.jpg", str(tmp_path), f"file://{tmp_path}"):
        with pytest.raises(OSError, match=r"none\.jpg|[Dd]irectory|regular file"):
            read_bytes(missing)


def test_read_bytes_of_percent_encoded_file_uris(tmp_path: Path) -> None:
    path = tmp_path / "with blank ü.jpg"
    path.write_bytes(b"content")
    assert "%20" in path.as_uri()
    assert read_bytes(path.as_uri()) == b"content"


def test_predict_images_keeps_order_and_bad_files(predictor: Predictor, photos: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photos[0].read_bytes()[:300])
    uris = [
        str(photos[3]),
        str(tmp_path / "none.jpg"),
        f"file://{photos[1]}",
        str(broken),
        str(photos[0]),
        str(photos[3]),
        "nonsense://bucket/a.jpg",
    ]
    expected = predictor([photos[3], photos[1], photos[0], photos[3]])
    for batch_size in (1, 2, 3, 50):
        predictions = list(predict_images(predictor, uris, batch_size))
        assert [prediction.uri for prediction in predictions] == uris
        errors = [prediction.error for prediction in predictions]
        assert [bool(error) for error in errors] == [False, True, False, True, False, False, True]
        assert [len(prediction.probabilities) for prediction in predictions] == [3, 0, 3, 0, 3, 3, 0]
        scored = torch.tensor([prediction.probabilities for prediction in predictions if not prediction.error])
        torch.testing.assert_close(scored, expected, rtol=0, atol=1e-6)
        assert "none.jpg" in errors[1]
        assert "broken or cut off" in errors[3]
        assert errors[6]
    assert list(predict_images(predictor, [])) == []


LABELS = ("dog", 'comma, "quote"', "new\nline", "Straße; ünï", "=1+1")
ROWS = [
    Prediction("a.jpg", (0.1, 0.25, 1 / 3, 0.0, 1.0)),
    Prediction('odd, "name"\nü.jpg', (), 'cannot, "read"\nit'),
    Prediction("c.jpg", (1e-9, 0.5, 0.5, 0.5, 0.123456789012345)),
]


def expected_rows() -> list[dict[str, object]]:
    return [
        {"image": row.uri}
        | {label: row.probabilities[index] if row.probabilities else None for index, label in enumerate(LABELS)}
        | {"error": row.error}
        for row in ROWS
    ]


def test_outputs_round_trip(tmp_path: Path) -> None:
    for suffix in (".csv", ".json", ".parquet"):
        write_predictions(tmp_path / f"out{suffix}", ROWS, LABELS)
        write_predictions(tmp_path / f"out{suffix}", ROWS, LABELS)  # replaces the first file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.json", "out.parquet"]
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == expected_rows()
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == expected_rows()
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [prediction.uri for prediction in ROWS]
    assert [row["error"] for row in rows] == [prediction.error for prediction in ROWS]
    for row, prediction in zip(rows, ROWS, strict=True):
        values = [row[label] for label in LABELS]
        assert [float(value) for value in values if value] == list(prediction.probabilities)


def test_labels_named_image_and_error_keep_both_columns(tmp_path: Path) -> None:
    """A data set may have a label `image` or `error`."""
    rows = [Prediction("a.jpg", (0.25, 0.75)), Prediction("b.jpg", (), "cut off")]
    write_predictions(tmp_path / "out.csv", rows, ("image", "error"))
    text = (tmp_path / "out.csv").read_text()
    assert [word for word in ("a.jpg", "0.25", "0.75", "b.jpg", "cut off") if word not in text] == []


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    for name, message in (("out.txt", r"must be one of \.csv \.json \.parquet"), ("none/out.csv", "does not exist")):
        for act in (lambda path: check_output(path, OUTPUTS), lambda path: write_predictions(path, ROWS, LABELS)):
            with pytest.raises(UserError, match=message):
                act(tmp_path / name)
    for suffix in (".csv", ".json", ".parquet"):
        path = tmp_path / f"taken{suffix}"
        path.mkdir()
        with pytest.raises(UserError, match=rf"taken\{suffix}: cannot be written \([^N]"):
            write_predictions(path, ROWS, LABELS)
        path.rmdir()
    assert list(tmp_path.iterdir()) == [], "no partial file is left behind"


Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Return a function that runs the command in this process on a wide terminal: exit code, output, errors."""
    monkeypatch.setenv("COLUMNS", "400")

    def run(*argv: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["msrn", *map(str, argv)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


def test_predict_on_hostile_files(cli: Cli, folder: Path, shared: Path, tmp_path: Path) -> None:
    hostile = shared / "data" / "hostile"
    out = tmp_path / "out.json"
    code, text, err = cli("predict", folder, hostile, "--out", out, "--batch-size", "4")
    assert (code, err) == (0, "")
    assert "6 of 19 images skipped" in text
    assert text.count("skipped: ") == 6
    assert f"wrote {out}" in text
    rows = {Path(row["image"]).name: row for row in json.loads(out.read_text())}
    assert len(rows) == 19
    assert {name for name, row in rows.items() if row["error"]} == set(BAD)
    for name, reason in BAD.items():
        assert reason in rows[name]["error"]
        assert rows[name]["label 0"] is None
    scored = [row for row in rows.values() if not row["error"]]
    assert len(scored) == 13
    assert all(0 < row[f"label {index}"] < 1 for row in scored for index in range(3))


def test_predict_lists_labels_above_their_threshold(cli: Cli, folder: Path, tmp_path: Path) -> None:
    photo = make_photo(tmp_path / "a.png")
    checkpoint = load_checkpoint(folder)
    (values,) = Predictor(checkpoint)([photo]).tolist()
    ranked = sorted(zip(values, checkpoint.label_names, strict=True), reverse=True)
    below = tuple(value - 0.01 for value in values)
    save_checkpoint(tmp_path / "all", replace(checkpoint, thresholds=below))
    _, text, _ = cli("predict", tmp_path / "all", photo)
    assert ", ".join(f"{name} {value:.2f}" for value, name in ranked) in text
    save_checkpoint(
        tmp_path / "one", replace(checkpoint, thresholds=(values[0] + 0.01, values[1] - 0.01, values[2] + 0.01))
    )
    _, text, _ = cli("predict", tmp_path / "one", photo)
    assert f"label 1 {values[1]:.2f}" in text
    assert "label 0" not in text
    assert "label 2" not in text
    save_checkpoint(tmp_path / "none", replace(checkpoint, thresholds=(1.0, 1.0, 1.0)))
    _, text, _ = cli("predict", tmp_path / "none", photo)
    assert f"none above its threshold; likeliest {ranked[0][1]} {ranked[0][0]:.2f}" in text
    assert "1 of 1 images have no label above its threshold; train longer" in text


def test_predict_prints_brackets_in_names(cli: Cli, folder: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(folder)
    save_checkpoint(tmp_path / "red", replace(checkpoint, thresholds=(0.0, 0.0, 0.0)))
    _, text, _ = cli("predict", tmp_path / "red", make_photo(tmp_path / "[red]a.png"))
    assert "[red]a.png" in text


def test_predict_with_nothing_readable(cli: Cli, folder: Path, tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_text("no image")
    code, text, err = cli("predict", folder, tmp_path, "--out", tmp_path / "out.csv")
    assert code == 2
    assert text.count("skipped: ") == 2
    assert err == "msrn: error: none of the images could be read\n"
    assert not (tmp_path / "out.csv").exists()


def test_predict_accepts_a_run_folder(cli: Cli, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run" / "checkpoint_3")
    (tmp_path / "run" / "best.txt").write_text("checkpoint_3\n")
    make_picture(3).save(tmp_path / "a.bmp")
    code, text, _ = cli("predict", tmp_path / "run", tmp_path / "a.bmp")
    assert code == 0
    assert "a.bmp" in text


def test_narrow_screen_shows_whole_path(
    cli: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    photo = make_photo(tmp_path / "a-rather-long-folder-name-for-one-photo" / "and-a-long-name-of-the-photo-itself.png")
    _, text, _ = cli("predict", folder, photo)
    column = "".join(line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│"))
    assert column == str(photo)


def test_predict_reports_an_unreadable_uri(cli: Cli, folder: Path, tmp_path: Path) -> None:
    code, text, err = cli("predict", folder, make_photo(tmp_path / "a.png"), "https://nowhere.invalid/b.jpg")
    assert (code, err) == (0, "")
    assert "1 of 2 images skipped" in text
    assert "https" in text
