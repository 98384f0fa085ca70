"""Writes sample tables as a manifest that `read_manifest` reads back: `msrn convert`."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np

from ..io.storage import Location
from ..types import PRESENT, UNKNOWN, SampleTable
from .split_names import SplitName

COLUMNS = ("image", "labels", "unknown", "split")
# with one of these in a name, `;` between the names of a row would not be certain
_UNCERTAIN = re.compile(r"""[;|,\r\n]|^[\s\[{('"]|\s$""")


def write_manifest(tables: Mapping[SplitName, SampleTable], out: Location) -> None:
    """Write the images of all splits as CSV with the columns image, labels, unknown (only if labels are unknown) and split.

    Paths of images below the folder of `out` are relative to it. Labels have `;` between them. All cells are JSON lists instead if a name
    holds a separator, or if no image has two labels: a reader could take the cells for something else then.

    Args:
        tables: at least one split, all with the same labels. With train alone, the column split is left out.
        out: the file.

    Raises:
        UserError: if the file cannot be written.
    """
    names = np.array(next(iter(tables.values())).label_names, object)
    has_unknown = any((table.targets == UNKNOWN).any() for table in tables.values())
    has_several = any(((table.targets == PRESENT).sum(1) > 1).any() for table in tables.values())
    as_json = not has_several or any(_UNCERTAIN.search(name) for name in names)
    header = [
        name for name in COLUMNS if (name != "unknown" or has_unknown) and (name != "split" or {*tables} != {"train"})
    ]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, header, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    folder = str(out.parent)
    for split, table in tables.items():
        for uri, target in zip(table.table["uri"].to_pylist(), table.targets, strict=True):
            writer.writerow(
                {
                    "image": _relative(uri, folder) if out.is_local else uri,
                    "labels": _cell(names[target == PRESENT], as_json),
                    "unknown": _cell(names[target == UNKNOWN], as_json),
                    "split": split,
                }
            )
    out.write_bytes(text.getvalue().encode())


def _cell(names: Sequence[str], as_json: bool) -> str:
    return json.dumps([*names], ensure_ascii=False) if as_json else ";".join(names)


def _relative(uri: str, folder: str) -> str:
    below = "://" not in uri and uri.startswith(folder.rstrip("/") + "/") and ".." not in uri.split("/")
    return os.path.relpath(uri, folder) if below else uri
