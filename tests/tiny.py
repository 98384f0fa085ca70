"""Small test data: photographs, a data set in COCO's layout, a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from msrn_ray.config import ExperimentConfig
from msrn_ray.data_settings import DataSettings
from msrn_ray.labels.graph import LabelCounts, attend_mask
from msrn_ray.model import build_model
from msrn_ray.runs.checkpoint import Checkpoint, save_checkpoint
from msrn_ray.settings import ModelSettings

CATEGORIES = ("apple", "bench", "cat")


def make_picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """Return coarse coloured blocks, which JPEG keeps distinct; every seed gives another picture."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def make_photo(path: Path, seed: int = 0) -> Path:
    """Write a small picture in the format of the path's suffix; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    make_picture(seed).save(path)
    return path


def make_coco(root: Path, splits: Mapping[str, Sequence[Sequence[int]]], names: Sequence[str] = CATEGORIES) -> Path:
    """Write a data set in COCO's layout with real JPEGs; return its folder.

    Args:
        root: its folder.
        splits: name (`train`, `val`, `test`) -> per image the positions of its labels in `names`.
        names: the categories, in alphabetical order.
    """
    (root / "annotations").mkdir(parents=True)
    for number, (split, rows) in enumerate(splits.items(), 1):
        images = [{"id": 1000 * number + row, "file_name": f"{split}_{row:03}.jpg"} for row in range(len(rows))]
        for image in images:
            make_photo(root / f"{split}2014" / str(image["file_name"]), int(image["id"]))
        pairs = [(image["id"], label) for image, labels in zip(images, rows, strict=True) for label in labels]
        content = {
            "images": images,
            "categories": [{"id": 7 + position, "name": name} for position, name in enumerate(names)],
            "annotations": [
                {"id": position, "image_id": image, "category_id": 7 + label}
                for position, (image, label) in enumerate(pairs, 1)
            ],
        }
        (root / f"annotations/instances_{split}2014.json").write_text(json.dumps(content))
    return root


def make_tiny_checkpoint(folder: Path, num_labels: int = 3, name: Literal["msrn", "gap", "gmp"] = "msrn") -> Path:
    """Write a checkpoint of a small network with random weights whose scores differ between images; return its folder.

    Labels are `label 0`, `label 1`, ...; label 0 attends to label 1 but not vice versa; thresholds differ.
    """
    config = ExperimentConfig(
        data=DataSettings(image_size=64),
        model=ModelSettings(
            name=name,
            backbone="resnet10",
            pretrained=None,
            levels=("layer1", "layer2"),
            head="elementwise",
            embed_dim=16,
            label_hidden_dim=8,
            graph_hidden_dim=8,
            group_ratio=0.7,
        ),
    )
    names = tuple(f"label {index}" for index in range(num_labels))
    pairs = np.zeros((num_labels, num_labels), np.int64)
    pairs[0, 1] = pairs[1, 0] = 4
    counts = LabelCounts(names, pairs, np.array([20, 5, *range(6, 4 + num_labels)], np.int64)[:num_labels])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = build_model(config.model, torch.randn(num_labels, 10), attend_mask(counts, config.model.tau))
        with torch.no_grad():
            model.head.weight.mul_(5)
    thresholds = tuple(0.3 + 0.4 * index / num_labels for index in range(num_labels))
    metrics = {"val/mAP": 0.25}
    save_checkpoint(folder, Checkpoint(config, names, counts, model.state_dict(), thresholds, metrics, epoch=2))
    return folder
