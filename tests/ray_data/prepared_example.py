"""A small data set, and it prepared in shards of two images."""

from __future__ import annotations

from pathlib import Path

from msrn_ray.data_settings import DataSettings

ROWS = {"train": [[0], [1], [0, 1], [2], [], [0, 2], [1, 2]], "val": [[0], [1], [2]]}


def raw_settings(root: Path, **changes: object) -> DataSettings:
    return DataSettings(dataset="coco", root=str(root), image_size=64).model_copy(update=changes)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
