"""Reads NUS-WIDE in both its public forms: the official lists with a file of 0 and 1 per concept, and the csv of later papers.

Their images and splits differ, so scores on one do not compare with scores on the other.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv

from ..errors import UserError
from ..io.storage import Location
from ..types import PRESENT, SampleTable
from .image_uris import MissingImages, find_images, missing_notes, uris_below
from .text_files import hint, read_data, read_label_names, read_lines, read_text, require_unique, unlabelled_note

# The order of the authors' release and so of their checkpoints; the official list is alphabetical.
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
SPLITS = ("Train", "Test")
CSV_FILE = "nus_wid_data.csv"
_CONCEPTS = "Concepts81.txt"
_CONCEPTS_FILE = "name a file in the folder of NUS-WIDE with one concept a line"
_CSV_SPLITS = {"train": "Train", "val": "Test"}
_CSV_COLUMNS = ("filepath", "label", "split_name")
_LABEL_FOLDER = "Groundtruth/TrainTestLabels"
_OFFICIAL = f"ImageList/, {_LABEL_FOLDER}/, {_CONCEPTS} and Flickr/"

Form = Literal["official", "csv"]


def read_nuswide(
    root: str | Path | Location,
    split: str,
    *,
    keep_unlabelled: bool = True,
    form: Form | None = None,
    concepts: str | None = None,
    missing_images: MissingImages = "error",
) -> SampleTable:
    """Reads one split.

    Args:
        root: the folder that holds `ImageList/`, `Groundtruth/TrainTestLabels/`, `Concepts81.txt` and `Flickr/`, or `nus_wid_data.csv`
            and the images that its rows name; a path or URI.
        split: "Train" or "Test", which the csv calls `val`.
        keep_unlabelled: whether images without a label stay in, as rows of zeros.
        form: which form to read; None: the official lists if they are there, else the csv.
        concepts: file of the concepts to read in `root`, one a line. None: for the official lists `Concepts81.txt`, else another
            `Concepts*.txt`, else all that have a file of labels; for the csv the 81.
        missing_images: whether listed images that are not there are an error or left out.

    Returns:
        n rows in the order of the list, targets in {1, 0}; `image_id` is the path in `Flickr/` (in `root` for the csv's images
        elsewhere). Labels are in the order of `NUSWIDE_LABELS` if they are just these, else in the order of the concepts' file.

    Raises:
        UserError: if a file is missing or damaged, the files do not fit together, or images are not there.
    """
    if split not in SPLITS:
        raise UserError(f"NUS-WIDE has no split {split!r}; choose from: {', '.join(SPLITS)}")
    root = Location.of(root)
    read = {"official": _read_official, "csv": _read_csv}[form or _find_form(root)]
    return read(root, split, keep_unlabelled, concepts, missing_images)


def _find_form(root: Location) -> Form:
    if (root / "ImageList").is_dir():
        return "official"
    if (root / CSV_FILE).is_file():
        return "csv"

    def holds(place: Location) -> bool:
        return (place / "ImageList").is_dir() or (place / CSV_FILE).is_file()

    what = "holds neither ImageList/ nor" if root.is_dir() else "no such folder with ImageList/ or"
    raise UserError(
        f"{root}: {what} {CSV_FILE}; give the folder that holds {_OFFICIAL}, or {CSV_FILE} and its images{hint(root, holds)}"
    )


def _read_official(
    root: Location, split: str, keep_unlabelled: bool, concepts: str | None, missing_images: MissingImages
) -> SampleTable:
    listing = root / "ImageList" / f"{split}Imagelist.txt"
    label_names = _official_concepts(root, split, concepts)
    mend = f"give the folder that holds {_OFFICIAL}"
    image_ids = [line.strip().replace("\\", "/") for line in read_lines(listing, mend) if line.strip()]
    if not image_ids:
        raise UserError(f"{listing}: is empty; download it again")
    require_unique(listing, "the list of images", image_ids)
    targets = np.empty((len(image_ids), len(label_names)), np.int8)
    for column, label in enumerate(label_names):
        targets[:, column] = _read_labels(root / _LABEL_FOLDER / f"Labels_{label}_{split}.txt", len(image_ids), listing)
    folder = root / "Flickr"
    found = find_images(folder, image_ids, listing, missing_images)
    return _to_samples(
        split, image_ids, uris_below(folder, image_ids), targets, label_names, listing.name, found, keep_unlabelled
    )


def _official_concepts(root: Location, split: str, file: str | None) -> tuple[str, ...]:
    """The concepts to read, in their order; each must have a file of labels."""
    files = (root / _LABEL_FOLDER).names(missing_ok=True)
    in_train = [name[len("Labels_") : -len("_Train.txt")] for name in files if _is_of_train(name)]
    if not in_train:
        raise UserError(
            f"{root / _LABEL_FOLDER}: no file Labels_<concept>_Train.txt in it; give the folder that holds {_OFFICIAL}"
        )
    if file is None:
        lists = [name for name in root.names() if name.startswith("Concepts") and name.endswith(".txt")]
        if len(lists) > 1 and _CONCEPTS not in lists:
            raise UserError(f"{root}: has {' and '.join(lists)}; say which with --data.concepts")
        file = _CONCEPTS if _CONCEPTS in lists else next(iter(lists), None)
    concepts = tuple(in_train) if file is None else read_label_names(root / file, _CONCEPTS_FILE)
    for concept in concepts:
        if f"Labels_{concept}_{split}.txt" not in files:
            raise UserError(
                f"{root / (file or _LABEL_FOLDER)}: the concept {concept!r} has no {_LABEL_FOLDER}/Labels_{concept}_{split}.txt;"
                f" unpack it or correct the name{_did_you_mean(concept, in_train)}"
            )
    return NUSWIDE_LABELS if set(concepts) == set(NUSWIDE_LABELS) else concepts


def _is_of_train(file: str) -> bool:
    return file.startswith("Labels_") and file.endswith("_Train.txt")


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = [one for one in difflib.get_close_matches(name, known, 1) if one != name]
    return f" (did you mean {near[0]}?)" if near else ""


def _read_labels(path: Location, num_images: int, listing: Location) -> npt.NDArray[np.int8]:
    """[n] int8 in {1, 0}: one figure a line, in the order of the list of images."""
    figures = read_data(path, "unpack Groundtruth/ again").removeprefix(b"\xef\xbb\xbf").split()
    if len(figures) != num_images:
        raise UserError(
            f"{path}: {len(figures)} labels for the {num_images} images of {listing.name}; they must pair up"
        )
    if not set(figures) <= {b"0", b"1"}:
        row = next(row for row, figure in enumerate(figures) if figure not in (b"0", b"1"))
        raise UserError(
            f"{path}, line {row + 1}: {figures[row].decode(errors='replace')!r} is not 0 or 1; correct the line"
        )
    return (np.frombuffer(b"".join(figures), np.int8) - ord("0")).astype(np.int8)


def _read_csv(
    root: Location, split: str, keep_unlabelled: bool, concepts: str | None, missing_images: MissingImages
) -> SampleTable:
    path = root / CSV_FILE
    table = _parse_csv(path)
    names = [name.replace("\\", "/") for name in table["filepath"].to_pylist()]
    image_ids = [name.removeprefix("Flickr/") for name in names]
    require_unique(path, "filepath", image_ids)
    split_names = table["split_name"].to_pylist()
    strange = next((row for row, name in enumerate(split_names) if name not in _CSV_SPLITS), None)
    if strange is not None:
        allowed = " or ".join(_CSV_SPLITS)
        raise UserError(f"{path}, row {strange + 1}: split_name is {split_names[strange]!r}, not {allowed}; correct it")
    rows = [row for row, name in enumerate(split_names) if _CSV_SPLITS[name] == split]
    if not rows:
        raise UserError(f"{path}: no row of split {split}; download it again")

    given = None if concepts is None else read_label_names(root / concepts, _CONCEPTS_FILE)
    label_names = NUSWIDE_LABELS if given is None or set(given) == set(NUSWIDE_LABELS) else given
    targets = _csv_targets(path, table["label"], label_names)[rows]
    names = [names[row] for row in rows]
    found = find_images(root, names, path, missing_images)
    source = f"{path.name} {split_names[rows[0]]}"
    kept_ids = [image_ids[row] for row in rows]
    return _to_samples(split, kept_ids, uris_below(root, names), targets, label_names, source, found, keep_unlabelled)


def _parse_csv(path: Location) -> pa.Table:
    """The three columns, as text."""
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
    """[n, C] int8 in {1, 0} from Python lists as text; each text is parsed once, however many rows have it."""
    texts = column.combine_chunks().dictionary_encode()
    place = {label: index for index, label in enumerate(label_names)}
    known = set(NUSWIDE_LABELS).union(label_names)
    patterns = np.zeros((len(texts.dictionary), len(label_names)), np.int8)
    for number, text in enumerate(texts.dictionary.to_pylist()):
        labels = _parse_labels(text)
        if labels is None or not known.issuperset(labels):
            row = texts.indices.index(number).as_py() + 1
            raise UserError(f"{path}, row {row}: {_what_is_wrong(text, labels, known)}")
        patterns[number, [place[label] for label in labels if label in place]] = PRESENT
    for label in label_names:
        if label not in NUSWIDE_LABELS and not patterns[:, place[label]].any():
            raise UserError(
                f"{path}: no row has the concept {label!r}; correct its name in the file of --data.concepts"
            )
    codes: npt.NDArray[np.int32] = texts.indices.to_numpy()
    return patterns[codes]


def _what_is_wrong(text: str, labels: list[str] | None, known: set[str]) -> str:
    if labels is None:
        return f"the label {text!r:.80} is not a list such as ['sky', 'sun']; correct it"
    strange = next(label for label in labels if label not in known)
    near = _did_you_mean(strange, sorted(known))
    return (
        f"{strange!r} is no concept of NUS-WIDE; correct it{near}, or name a file of the concepts with --data.concepts"
    )


def _parse_labels(text: str) -> list[str] | None:
    """The names in a Python list written as text; None if it is something else."""
    try:
        labels = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # what it raises for text of any kind
        return None
    return labels if isinstance(labels, list) and all(isinstance(label, str) for label in labels) else None


def _to_samples(
    split: str,
    image_ids: list[str],
    uris: pa.ChunkedArray,
    targets: npt.NDArray[np.int8],
    label_names: tuple[str, ...],
    source: str,
    found: npt.NDArray[np.bool_],
    keep_unlabelled: bool,
) -> SampleTable:
    labelled = np.asarray(targets.any(1))
    notes = (*missing_notes(split, found), unlabelled_note(split, labelled[found], keep_unlabelled))
    rows = np.flatnonzero(found if keep_unlabelled else found & labelled)
    return SampleTable.from_columns(image_ids, uris, targets, label_names, source, notes).take(rows)
