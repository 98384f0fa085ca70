"""The embedded data set `scenes`: pictures of landscapes, written as JPEG files in the layout of COCO 2014.

It needs no download and is small enough to train on from scratch. Yet it has the traits of multi-label data: objects of
very different sizes, several labels per picture, and labels that imply or exclude each other. "size" is the area of
one box in per cent of the picture (for nine boxes in ten), "boxes" the number of boxes in a picture with that label.

    id  label          category  size, %      boxes  where
     2  sun            sky        3.0 - 7.0   1      sky, day
     3  moon           sky        1.4 - 4.0   1      sky, night
     5  star           sky        0.2 - 0.6   2 - 6  sky, night
     7  cloud          sky        2.6 - 7.5   1 - 3  sky
    11  bird           animal     0.9 - 2.1   1 - 4  sky, day
    12  fish           animal     1.7 - 3.8   1 - 3  sea
    16  car            vehicle    3.0 - 7.2   1 - 2  road
    17  boat           vehicle    2.9 - 8.4   1 - 2  sea
    20  airplane       vehicle    3.8 - 8.1   1      sky
    21  traffic light  vehicle    2.0 - 4.0   1 - 2  beside the road
    27  tree           plant      3.8 - 9.8   1 - 4  meadow, street
    28  flower         plant      1.4 - 2.7   2 - 5  meadow, street
    33  road           ground      21 - 42    1      street
    34  sea            ground      31 - 57    1      coast
    40  mountain       ground     6.7 - 20    1      coast, meadow
    41  house          ground     6.6 - 16    1 - 2  meadow, street

The rules of co-occurrence, which hold without exception:

    implies    boat -> sea, fish -> sea, car -> road, traffic light -> road, star -> moon
    excludes   sun, bird              with moon, star
               sea, boat, fish        with road, car, traffic light, house, tree, flower
               mountain               with road, car, traffic light

Balloons, kites, rocks, crates, signs and bushes are drawn too but are no labels: they share colours and shapes with
objects that are.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ..split_names import SPLITS
from .painter import Box, paint

GENERATOR = "msrn_ray scenes"
VERSION = "1"  # part of the cache key: increase it with every change of a pixel or a label
IMAGES_PER_PROCESS = 100  # for fewer images, starting a process does not pay
JPEG_QUALITY = 90
CATEGORIES = {  # label -> (category id, supercategory); as in COCO ids have gaps and do not follow the names' order
    "sun": (2, "sky"),
    "moon": (3, "sky"),
    "star": (5, "sky"),
    "cloud": (7, "sky"),
    "bird": (11, "animal"),
    "fish": (12, "animal"),
    "car": (16, "vehicle"),
    "boat": (17, "vehicle"),
    "airplane": (20, "vehicle"),
    "traffic light": (21, "vehicle"),
    "tree": (27, "plant"),
    "flower": (28, "plant"),
    "road": (33, "ground"),
    "sea": (34, "ground"),
    "mountain": (40, "ground"),
    "house": (41, "ground"),
}
IMPLICATIONS = {"boat": "sea", "fish": "sea", "car": "road", "traffic light": "road", "star": "moon"}
PLACES = {  # place -> label -> probability
    "coast": {"sea": 1.0, "boat": 0.5, "fish": 0.4, "mountain": 0.25},
    "meadow": {"tree": 0.6, "house": 0.35, "flower": 0.5, "mountain": 0.35},
    "street": {"road": 1.0, "car": 0.6, "traffic light": 0.45, "house": 0.3, "tree": 0.3, "flower": 0.15},
}
PLACE_ODDS = {"coast": 0.37, "meadow": 0.31, "street": 0.32}
SKIES = {
    "day": {"sun": 0.5, "cloud": 0.35, "bird": 0.35, "airplane": 0.2},
    "night": {"moon": 0.75, "star": 0.65, "cloud": 0.2, "airplane": 0.2},
}
DAY_ODDS = 0.62
Record = tuple[int, int, list[tuple[str, Box]]]  # width, height, (label, visible box) of each object


def draw_labels(rng: np.random.Generator) -> tuple[frozenset[str], str, str]:
    """Draw at least one label, and the place and sky that contain the labels."""
    while True:
        place = str(rng.choice(list(PLACE_ODDS), p=list(PLACE_ODDS.values())))
        sky = "day" if rng.random() < DAY_ODDS else "night"
        odds = PLACES[place] | SKIES[sky]
        drawn = {label for label, chance in odds.items() if rng.random() < chance}
        labels = drawn - {label for label, needed in IMPLICATIONS.items() if needed not in drawn}
        if labels:
            return frozenset(labels), place, sky


def _write_image(path: str, key: tuple[int, int, int]) -> Record:
    """Write one picture. It depends on `key` only: seed, number of the split, number in the split."""
    rng = np.random.default_rng(key)
    image, objects = paint(*draw_labels(rng), rng)
    image.save(path, quality=JPEG_QUALITY)
    return image.width, image.height, objects


def _end_with_parent() -> None:
    """End this process as soon as its parent ends, even by SIGKILL. A pool's process would otherwise wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_images(paths: list[str], keys: list[tuple[int, int, int]]) -> list[Record]:
    num_processes = min(os.cpu_count() or 1, len(paths) // IMAGES_PER_PROCESS)
    if num_processes <= 1:
        return list(map(_write_image, paths, keys))
    context = multiprocessing.get_context("spawn")  # fork would copy the locks of torch's and Ray's threads
    with ProcessPoolExecutor(num_processes, context, initializer=_end_with_parent) as pool:
        return list(pool.map(_write_image, paths, keys, chunksize=25))


def _info(num_images: dict[str, int], seed: int) -> dict[str, Any]:
    return {
        "description": GENERATOR,
        "version": VERSION,
        "year": 2014,
        "parameters": {**{f"num_{split}": number for split, number in num_images.items()}, "seed": seed},
    }


def _annotation_file(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}2014.json"


def _build(root: Path, num_images: dict[str, int], seed: int) -> None:
    """Write the whole data set into the new folder `root`; image and annotation ids are unique over the splits."""
    names: dict[str, list[str]] = {}
    first_id = 1
    for split, number in num_images.items():
        (root / f"{split}2014").mkdir(parents=True)
        names[split] = [f"COCO_{split}2014_{first_id + i:012d}.jpg" for i in range(number)]
        first_id += number
    records = iter(
        _write_images(
            [str(root / f"{split}2014" / name) for split in SPLITS for name in names[split]],
            [(seed, SPLITS.index(split), i) for split in SPLITS for i in range(num_images[split])],
        )
    )
    (root / "annotations").mkdir()
    categories = [{"id": i, "name": name, "supercategory": group} for name, (i, group) in CATEGORIES.items()]
    image_id = annotation_id = 0
    for split in SPLITS:
        images, annotations = [], []
        for name in names[split]:
            width, height, objects = next(records)
            image_id += 1
            images.append({"id": image_id, "file_name": name, "width": width, "height": height})
            for label, box in objects:
                annotation_id += 1
                annotations.append(
                    {
                        "id": annotation_id,
                        "image_id": image_id,
                        "category_id": CATEGORIES[label][0],
                        "bbox": list(box),
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
        content = {
            "info": _info(num_images, seed),
            "licenses": [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}],
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        _annotation_file(root, split).write_text(json.dumps(content))


def _written_info(root: Path) -> Any:
    """Return the info of the data set at `root`, or None. The folder is moved in complete, so one file proves all of them."""
    try:
        return json.loads(_annotation_file(root, "train").read_text())["info"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def generate_scenes(
    root: Path, *, num_train: int = 2000, num_val: int = 500, num_test: int = 500, seed: int = 0
) -> Path:
    """Write the data set to `root` unless it exists there; the same arguments give the same bytes.

    The data set is built beside `root` and moved in at the end, so an existing folder is complete. Concurrent callers take turns.
    Several processes draw, so a script that calls this function needs `if __name__ == "__main__":`.

    Args:
        root: the folder to hold `train2014/`, `val2014/`, `test2014/` and `annotations/`. Scenes of another version
            or of other arguments in it are replaced.
        num_train, num_val, num_test: images per split, 1 or more.
        seed: 0 or more.

    Returns:
        root, as an absolute path.

    Raises:
        UserError: if an argument is out of range, or `root` holds anything but this data set.
    """
    num_images = {"train": num_train, "val": num_val, "test": num_test}
    for split, number in num_images.items():
        if number < 1:
            raise UserError(f"scenes: num_{split} is {number}; give 1 or more")
    if seed < 0:
        raise UserError(f"scenes: seed is {seed}; give 0 or more")
    root = root.resolve()
    info = _info(num_images, seed)
    if _written_info(root) == info:
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with (root.parent / f".{root.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it when this process ends, even by SIGKILL
        found = _written_info(root)
        if found == info:
            return root
        is_scenes = isinstance(found, dict) and found.get("description") == GENERATOR
        if root.exists() and not is_scenes and not (root.is_dir() and not any(root.iterdir())):
            raise UserError(f"scenes: {root} exists and is not this data set; give another folder or remove it")
        for left_over in root.parent.glob(f".{root.name}.building-*"):
            shutil.rmtree(left_over, ignore_errors=True)  # a killed caller left it; its workers may still be ending
        with tempfile.TemporaryDirectory(prefix=f".{root.name}.building-", dir=root.parent) as work:
            new, old = Path(work, "new"), Path(work, "old")
            _build(new, num_images, seed)
            if is_scenes:
                os.replace(root, old)
            os.replace(new, root)
    return root
