"""Reads both public forms of NUS-WIDE: the official lists with a file of 0 and 1 per concept, and the csv of later papers.

Their images and splits differ, so scores on one form cannot be compared with scores on the other.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from ..errors import UserError
from ..io.storage import Location
from ..types import PRESENT, SampleTable
from .image_uris import MissingImages, find_images, select_rows, uris_below
from .text_files import read_data, read_label_names, read_lines, read_text, require_unique, suggest_folder

# The order of the authors' release and of their checkpoints; the official list is alphabetical.
NUSWIDE_LABELS = (
    *("clouds", "sky", "person", "street", "window", "tattoo", "wedding", "animal", "cat", "buildings", "tree"),
    *("airport", "plane", "water", "grass", "cars", "road", "snow", "sunset", "railroad", "train", "flowers"),
    *("plants", "house", "military", "horses", "nighttime", "lake", "rocks", "waterfall", "sun", "vehicle"),
    *("sports", "reflection", "temple", "statue", "ocean", "town", "beach", "tower", "toy", "book", "bridge"),
    *("fire", "mountain", "rainbow", "garden", "police", "coral", "fox", "sign", "dog", "cityscape", "sand"),
    *("dancing", "leaf", "tiger", "moon", "birds", "food", "cow", "valley", "fish", "harbor", "bear", "castle"),
    *("boats", "running", "glacier", "swimmers", "elk", "frost", "protest", "soccer", "flags", "zebra", "surf"),
    *("whales", "computer", "earthquake", "map"),
)
CSV_FILE = "nus_wid_data.csv"
_CSV_SPLITS = {"Train": "train", "Test": "val"}  # split in the official lists -> split in the csv
_CONCEPTS = "Concepts81.txt"
_NAME_CONCEPTS = "name a file in the folder of NUS-WIDE with one concept per line"
_CSV_COLUMNS = ("filepath", "label", "split_name")
_LABEL_FOLDER = "Groundtruth/TrainTestLabels"
_OFFICIAL = f"ImageList/, {_LABEL_FOLDER}/, {_CONCEPTS} and Flickr/"

Form = Literal["official", "csv"]


def read_nuswide(
    root: Location,
    split: str,
    *,
    keep_unlabelled: bool = True,
    form: Form | None = None,
    concepts: str | None = None,
    missing_images: MissingImages = "error",
) -> SampleTable:
    """Read one split.

    Args:
        root: the folder that holds `ImageList/`, `Groundtruth/TrainTestLabels/`, `Concepts81.txt` and `Flickr/`, or `nus_wid_data.csv`
            and the images that its rows name.
        split: "Train" or "Test", which the csv calls `val`.
        keep_unlabelled: whether images without a label stay, as rows of zeros.
        form: which form to read; None: the official lists if they exist, else the csv.
        concepts: file in `root` with the concepts to read, one per line. None: for the official lists `Concepts81.txt`, else another
            `Concepts*.txt`, else all concepts that have a file of labels; for the csv the 81.
        missing_images: whether missing images are an error or left out.

    Returns:
        n rows in the order of the list, targets in {1, 0}; `image_id` is the path in `Flickr/` (in `root` for images of the csv
        elsewhere). Labels are in the order of `NUSWIDE_LABELS` if they are the same set, else in the order of the file of concepts.

    Raises:
        UserError: if a file is missing or damaged, the files contradict each other, or images are missing.
    """
    if split not in _CSV_SPLITS:
        raise UserError(f"NUS-WIDE has no split {split!r}; choose from: {', '.join(_CSV_SPLITS)}")
    read = {"official": _read_official, "csv": _read_csv}[form or _find_form(root)]
    samples, found = read(root, split, concepts, missing_images)
    return select_rows(samples, split, keep_unlabelled, found)


def _find_form(root: Location) -> Form:
    if (root / "ImageList").is_dir():
        return "official"
    if (root / CSV_FILE).is_file():
        return "csv"

    def holds_data(folder: Location) -> bool:
        return (folder / "ImageList").is_dir() or (folder / CSV_FILE).is_file()

    what = "holds neither ImageList/ nor" if root.is_dir() else "no such folder with ImageList/ or"
    raise UserError(
        f"{root}: {what} {CSV_FILE}; give the folder that holds {_OFFICIAL}, or {CSV_FILE} and its"
        f" images{suggest_folder(root, holds_data)}"
    )


def _read_official(
    root: Location, split: str, concepts: str | None, missing_images: MissingImages
) -> tuple[SampleTable, npt.NDArray[np.bool_]]:
    """Return all listed images, and [n] bool, False for missing images that are left out."""
    listing = root / "ImageList" / f"{split}Imagelist.txt"
    label_names = _official_concepts(root, split, concepts)
    fix = f"give the folder that holds {_OFFICIAL}"
    image_ids = [line.strip().replace("\\", "/") for line in read_lines(listing, fix) if line.strip()]
    if not image_ids:
        raise UserError(f"{listing}: is empty; download it again")
    require_unique(listing, "the list of images", image_ids)
    targets = np.empty((len(image_ids), len(label_names)), np.int8)
    for column, label in enumerate(label_names):
        targets[:, column] = _read_labels(root / _LABEL_FOLDER / f"Labels_{label}_{split}.txt", len(image_ids), listing)
    folder = root / "Flickr"
    found = find_images(folder, image_ids, listing, missing_images)
    uris = uris_below(folder, image_ids)
    return SampleTable.from_columns(image_ids, uris, targets, label_names, listing.name), found


def _official_concepts(root: Location, split: str, file: str | None) -> tuple[str, ...]:
    """Return the concepts to read, in their order; each must have a file of labels."""
    files = (root / _LABEL_FOLDER).names(missing_ok=True)
    known = [match[1] for name in files if (match := re.fullmatch(r"Labels_(.+)_Train\.txt", name))]
    if not known:
        raise UserError(
            f"{root / _LABEL_FOLDER}: no file Labels_<concept>_Train.txt in it; give the folder that holds {_OFFICIAL}"
        )
    if file is None:
        lists = [name for name in root.names() if name.startswith("Concepts") and name.endswith(".txt")]
        if len(lists) > 1 and _CONCEPTS not in lists:
            raise UserError(f"{root}: has {' and '.join(lists)}; choose one with --data.concepts")
        file = _CONCEPTS if _CONCEPTS in lists else next(iter(lists), None)
    concepts = tuple(known) if file is None else read_label_names(root / file, _NAME_CONCEPTS)
    for concept in concepts:
        if f"Labels_{concept}_{split}.txt" not in files:
            raise UserError(
                f"{root / (file or _LABEL_FOLDER)}: the concept {concept!r} has no {_LABEL_FOLDER}/Labels_{concept}_{split}.txt;"
                f" unpack it or correct the name{_suggest_name(concept, known)}"
            )
    return NUSWIDE_LABELS if set(concepts) == set(NUSWIDE_LABELS) else concepts


def _suggest_name(name: str, known: Sequence[str]) -> str:
    matches = [match for match in difflib.get_close_matches(name, known, 1) if match != name]
    return f" (did you mean {matches[0]}?)" if matches else ""


def _read_labels(path: Location, num_images: int, listing: Location) -> npt.NDArray[np.int8]:
    """Return [n] int8 in {1, 0}: one digit per line, in the order of the list of images."""
    digits = read_data(path, "unpack Groundtruth/ again").removeprefix(b"\xef\xbb\xbf").split()
    if len(digits) != num_images:
        raise UserError(
            f"{path}: {len(digits)} labels for the {num_images} images of {listing.name}; write one label per image"
        )
    if not set(digits) <= {b"0", b"1"}:
        row = next(row for row, digit in enumerate(digits) if digit not in (b"0", b"1"))
        raise UserError(
            f"{path}, line {row + 1}: {digits[row].decode(errors='replace')!r} is not 0 or 1; correct the line"
        )
    return (np.frombuffer(b"".join(digits), np.int8) - ord("0")).astype(np.int8)


def _read_csv(
    root: Location, split: str, concepts: str | None, missing_images: MissingImages
) -> tuple[SampleTable, npt.NDArray[np.bool_]]:
    """Return all images of the split, and [n] bool, False for missing images that are left out."""
    path = root / CSV_FILE
    table = _parse_csv(path)
    names = pc.replace_substring(table["filepath"], "\\", "/")
    image_ids = pc.replace_substring_regex(names, "^Flickr/", "")
    require_unique(path, "filepath", image_ids.to_pylist())
    split_names, allowed = table["split_name"], list(_CSV_SPLITS.values())
    if (row := pc.index(pc.is_in(split_names, pa.array(allowed)), False).as_py()) >= 0:
        wrong = split_names[row].as_py()
        raise UserError(f"{path}, row {row + 1}: split_name is {wrong!r}, not {' or '.join(allowed)}; correct it")
    chosen = pc.equal(split_names, _CSV_SPLITS[split])
    if not pc.any(chosen).as_py():
        raise UserError(f"{path}: no row of split {split}; download it again")

    requested = None if concepts is None else read_label_names(root / concepts, _NAME_CONCEPTS)
    label_names = NUSWIDE_LABELS if requested is None or set(requested) == set(NUSWIDE_LABELS) else requested
    targets = _csv_targets(path, table["label"], label_names)[chosen.to_numpy()]
    names, image_ids = names.filter(chosen), image_ids.filter(chosen)
    found = find_images(root, names, path, missing_images)
    source = f"{path.name} {_CSV_SPLITS[split]}"
    return SampleTable.from_columns(image_ids, uris_below(root, names), targets, label_names, source), found


def _parse_csv(path: Location) -> pa.Table:
    """Return the three columns, as text."""
    text = read_text(path, f"give the folder that holds {CSV_FILE}")
    convert = pa_csv.ConvertOptions(
        column_types=dict.fromkeys(_CSV_COLUMNS, pa.string()), include_columns=list(_CSV_COLUMNS)
    )
    try:
        return pa_csv.read_csv(pa.BufferReader(text.encode()), convert_options=convert)
    except (pa.ArrowInvalid, KeyError) as error:
        raise UserError(
            f"{path}: cannot be read as CSV with the columns {', '.join(_CSV_COLUMNS)} ({' '.join(str(error).split())[:300]})"
        ) from None


def _csv_targets(path: Location, column: pa.ChunkedArray, label_names: tuple[str, ...]) -> npt.NDArray[np.int8]:
    """Return [n, C] int8 in {1, 0} from Python lists written as text; each distinct text is parsed once."""
    texts = column.combine_chunks().dictionary_encode()
    positions = {label: position for position, label in enumerate(label_names)}
    known = set(NUSWIDE_LABELS).union(label_names)
    patterns = np.zeros((len(texts.dictionary), len(label_names)), np.int8)
    for number, text in enumerate(texts.dictionary.to_pylist()):
        labels = _parse_labels(text)
        if labels is None or not known.issuperset(labels):
            row = texts.indices.index(number).as_py() + 1
            raise UserError(f"{path}, row {row}: {_why_wrong(text, labels, known)}")
        patterns[number, [positions[label] for label in labels if label in positions]] = PRESENT
    for label in label_names:
        if label not in NUSWIDE_LABELS and not patterns[:, positions[label]].any():
            raise UserError(
                f"{path}: no row has the concept {label!r}; correct its name in the file of --data.concepts"
            )
    codes: npt.NDArray[np.int32] = texts.indices.to_numpy()
    return patterns[codes]


def _why_wrong(text: str, labels: list[str] | None, known: set[str]) -> str:
    if labels is None:
        return f"the label {text!r:.80} is not a list such as ['sky', 'sun']; correct it"
    unknown = next(label for label in labels if label not in known)
    suggestion = _suggest_name(unknown, sorted(known))
    return f"{unknown!r} is no concept of NUS-WIDE; correct it{suggestion}, or name a file of concepts with --data.concepts"


def _parse_labels(text: str) -> list[str] | None:
    """Return the names in a Python list written as text; None for any other text."""
    try:
        labels = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # all that literal_eval raises for malformed text
        return None
    return labels if isinstance(labels, list) and all(isinstance(label, str) for label in labels) else None
