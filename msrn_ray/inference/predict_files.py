"""`msrn predict`: turns files, folders, patterns and URIs into a table of label probabilities."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch

from ..datasets.image_uris import IMAGE_SUFFIXES, is_image
from ..errors import UserError
from ..io.byte_ranges import read_bytes
from ..io.files import check_output, write_output
from .predictor import Predictor

OUTPUTS = (".csv", ".json", ".parquet")


@dataclass(frozen=True)
class Prediction:
    """One image: its C probabilities, or the error that prevented them."""

    uri: str
    probabilities: tuple[float, ...] = ()
    error: str = ""


def expand_images(inputs: Sequence[str]) -> list[str]:
    """Return files and URIs as given, the images at all levels of folders, and the matches of patterns.

    The images keep the order of the inputs, are sorted within each input, and occur once.

    Raises:
        UserError: for an input without an image.
    """
    found: dict[str, None] = {}
    for item in inputs:
        path = Path(item).expanduser()
        if "://" in item or path.is_file():
            images = [item if "://" in item else str(path)]
        elif path.is_dir():
            images = sorted(str(file) for file in path.rglob("*") if is_image(file.name) and file.is_file())
        else:
            images = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        if not images:
            problem = "holds no image" if path.is_dir() else "no such file, and no file matches it as a pattern"
            raise UserError(f"{item}: {problem}; give images ({' '.join(sorted(IMAGE_SUFFIXES))}), folders or patterns")
        found.update(dict.fromkeys(images))
    return list(found)


def predict_images(predictor: Predictor, uris: Sequence[str], batch_size: int = 32) -> Iterator[Prediction]:
    """Yield the prediction of each image, in order; an image that cannot be read or decoded yields its error instead."""
    for start in range(0, len(uris), batch_size):
        views, errors = {}, {}
        for uri in uris[start : start + batch_size]:
            try:
                views[uri] = predictor.view(read_bytes(uri))
            except (UserError, OSError) as error:
                errors[uri] = str(error)
        scores = predictor.score(torch.stack(list(views.values()))).tolist() if views else []
        by_uri = dict(zip(views, scores, strict=True))
        for uri in uris[start : start + batch_size]:
            yield Prediction(uri, error=errors[uri]) if uri in errors else Prediction(uri, tuple(by_uri[uri]))


def write_predictions(path: Path, predictions: Sequence[Prediction], label_names: Sequence[str]) -> None:
    """Write one row per image: `image`, one column of probabilities per label, `error`.

    The suffix selects the format: .csv, .json (a list of rows) or .parquet.

    Raises:
        UserError: for another suffix, or if the file cannot be written.
    """
    check_output(path, OUTPUTS)
    # a label may have the name of one of our columns
    image, reason = (name + "_" * (name in label_names) for name in ("image", "error"))
    columns: dict[str, list[str] | list[float | None]] = {image: [row.uri for row in predictions]}
    for index, label in enumerate(label_names):
        columns[label] = [row.probabilities[index] if row.probabilities else None for row in predictions]
    columns[reason] = [row.error for row in predictions]
    table = pa.table(columns)
    with write_output(path) as partial:
        if path.suffix == ".csv":
            pyarrow.csv.write_csv(table, partial)
        elif path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, partial)
        else:
            partial.write_text(json.dumps(table.to_pylist(), indent=1) + "\n", encoding="utf-8")
