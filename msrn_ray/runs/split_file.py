"""The file of a run folder that records which image is train, val and test; `msrn evaluate` scores the split that the run recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import UserError
from ..io.files import atomic_write
from .folder import cannot_be_written

SPLIT_FILE = "split.parquet"
_LABELS, _FINGERPRINT = b"label_names", b"fingerprint"


@dataclass(frozen=True)
class RecordedSplits:
    """What a run recorded about its images.

    Attributes:
        tables: sample tables (`image_id`, `uri`, `target`) by split: train, val and, if the run had one, test.
        label_names: C names in the order of the targets.
        fingerprint: of the train and val images and labels, see `describe_data`.
    """

    tables: Mapping[str, pa.Table]
    label_names: tuple[str, ...]
    fingerprint: str


def save_splits(folder: Path, splits: RecordedSplits) -> None:
    """Write the splits of a run into its folder, whole or not at all: `image_id`, `uri`, `split`, `target` ([C] int8).

    Raises:
        UserError: if the file cannot be written.
    """
    parts = [
        part.select(["image_id", "uri", "target"]).append_column(
            "split", pa.DictionaryArray.from_arrays(pa.nulls(len(part), pa.int8()).fill_null(0), [name])
        )
        for name, part in splits.tables.items()
    ]
    metadata = {_LABELS: json.dumps(splits.label_names).encode(), _FINGERPRINT: splits.fingerprint.encode()}
    table = pa.concat_tables(parts).replace_schema_metadata(metadata)
    try:
        with atomic_write(folder / SPLIT_FILE) as partial:
            pq.write_table(table, partial, compression="zstd")
    except OSError as error:
        raise cannot_be_written(folder, error) from None


def load_splits_of(model_file: Path) -> RecordedSplits | None:
    """Return what the run of a `model.pt` recorded; None if no split file lies beside the file or in the folder above.

    Raises:
        UserError: if the split file is damaged.
    """
    folder = model_file.absolute().parent
    files = [path / SPLIT_FILE for path in (folder, folder.parent) if (path / SPLIT_FILE).is_file()]
    if not files:
        return None
    try:
        table = pq.read_table(files[0], columns=["image_id", "uri", "split", "target"])
        metadata = table.schema.metadata
        label_names, fingerprint = tuple(json.loads(metadata[_LABELS])), metadata[_FINGERPRINT].decode()
        words = table["split"].cast(pa.string())
        names = [name for name in ("train", "val", "test") if pc.any(pc.equal(words, name)).as_py()]
        tables = {name: table.filter(pc.equal(words, name)).drop_columns(["split"]) for name in names}
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"{files[0]}: damaged ({' '.join(str(error).split())[:200]}); put it back from a copy, or delete it: then what the run"
            " trained on is unknown"
        ) from None
    return RecordedSplits(tables, label_names, fingerprint)
