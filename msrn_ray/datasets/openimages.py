"""Reads the image-level labels of Open Images: a row per image and label, with confidence 1 (present) or 0 (verified absent).

Labels that an image does not list are unknown: nobody looked for them (Kuznetsova et al., The Open Images Dataset V4, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv

from ..errors import UserError
from ..io.storage import Location
from ..types import ABSENT, PRESENT, UNKNOWN, SampleTable
from .image_lookup import locate_images
from .image_uris import MissingImages, find_local, missing_notes, require_images
from .manifest import CustomImages
from .split_names import SPLIT_WORDS, SPLITS, SplitName
from .text_files import first_few, read_data

IMAGE, LABEL, CONFIDENCE = "ImageID", "LabelName", "Confidence"
_NAMES = "class-descriptions"
_MAX_BYTES = 16 * 2**30  # of targets: images x labels


def is_openimages(file: Location) -> bool:
    """Return whether a CSV file has the columns of Open Images' image-level labels."""
    if not file.name.lower().endswith(".csv") or not file.is_file():
        return False
    with file.opened_input() as stream:
        header = bytes(stream.read(4096)).split(b"\n", 1)[0].decode("utf-8-sig", errors="replace")
    return {IMAGE, LABEL, CONFIDENCE} <= {*header.strip().split(",")}


def read_openimages(file: Location, label_names: Sequence[str] | None, missing_images: MissingImages) -> CustomImages:
    """Read the labels of one split; rows of one image and label may repeat if they agree.

    Args:
        file: the CSV file. A `class-descriptions*.csv` beside it gives the names of the labels.
        label_names: the labels to read, in their order; None: all that occur, in alphabetical order.
        missing_images: whether a missing local image is an error or a row to leave out.

    Returns:
        n images in the order of their first row; targets in {1, 0, -1}.

    Raises:
        UserError: if the file is damaged, a confidence is neither 0 nor 1, rows contradict each other, or images are missing.
    """
    parts = _find_parts(file)
    tables = [_read_rows(part) for part in parts.values()]
    rows = pa.concat_tables(tables).combine_chunks()
    confidence = rows[CONFIDENCE].to_numpy()
    wrong = np.flatnonzero((confidence != 0) & (confidence != 1))
    if len(wrong):
        raise UserError(
            f"{file}, row {wrong[0] + 1}: confidence {confidence[wrong[0]]:g} is neither 1 (present) nor 0 (absent); these look like"
            " machine-generated labels. Use the human-verified ones"
        )
    names, name_note = _read_names(file)
    images = rows[IMAGE].combine_chunks().dictionary_encode()
    labels = rows[LABEL].combine_chunks().dictionary_encode()
    texts = [names.get(code, code) for code in labels.dictionary.to_pylist()]
    wanted = tuple(label_names or sorted({*texts}))
    position = {name: at for at, name in enumerate(wanted)}
    columns = np.array([position.get(name, -1) for name in texts])[labels.indices.to_numpy()]
    num_images = len(images.dictionary)
    if num_images * len(wanted) > _MAX_BYTES:
        raise UserError(
            f"{file}: {num_images} images x {len(wanted)} labels do not fit; name fewer labels (--data.labels FILE)"
        )
    used = columns >= 0
    at = (images.indices.to_numpy()[used], columns[used])
    values = confidence[used].astype(np.int8)
    targets = np.full((num_images, len(wanted)), UNKNOWN, np.int8)
    targets[at] = values
    different = np.flatnonzero(targets[at] != values)
    if len(different):
        image, label = (int(part[different[0]]) for part in at)
        raise UserError(
            f"{file}: image {images.dictionary[image].as_py()!r} has label {wanted[label]!r} as present and as absent; keep one row"
        )
    counts = {value: int((targets == value).sum()) for value in (PRESENT, ABSENT, UNKNOWN)}
    note = (
        f"{file.name}: {num_images} images, {len(wanted)} labels (Open Images): {counts[PRESENT]} present, {counts[ABSENT]} verified"
        f" absent, {counts[UNKNOWN]} unknown; {name_note}"
    )
    ids = pa.chunked_array([images.dictionary])
    uris, found_notes = locate_images(file, ids)
    found = find_local(uris)
    require_images(file, uris, found, missing_images)
    notes = (note, *found_notes, *missing_notes(file.name, found))
    samples = SampleTable.from_columns(ids, uris, targets, wanted, file.name, notes)
    split = None if len(parts) == 1 else _split_codes(file, parts, tables, ids)[found]
    return CustomImages(samples.take(np.flatnonzero(found)), split)


def _find_parts(file: Location) -> dict[SplitName, Location]:
    """Return the file of each split: Open Images publishes `train-NAME`, `validation-NAME` and `test-NAME`."""
    word, _, rest = file.name.partition("-")
    if SPLIT_WORDS.get(word) != "train":
        return {"train": file}
    beside = {*file.parent.names()}
    others = {
        SPLIT_WORDS[word]: file.parent / f"{word}-{rest}"
        for word in ("validation", "test")
        if f"{word}-{rest}" in beside
    }
    return {"train": file, **others}


def _read_rows(file: Location) -> pa.Table:
    kinds = {IMAGE: pa.string(), LABEL: pa.string(), CONFIDENCE: pa.float64()}
    try:
        with file.opened_input() as stream:
            rows = pv.read_csv(stream, convert_options=pv.ConvertOptions(column_types=kinds, include_columns=[*kinds]))
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())[:200]}); download it again") from None
    if not rows.num_rows:
        raise UserError(f"{file}: has a header but no row; download it again")
    return rows


def _split_codes(
    file: Location, parts: dict[SplitName, Location], tables: list[pa.Table], ids: pa.ChunkedArray
) -> npt.NDArray[np.int8]:
    """Return [n] int8, the position in `SPLITS` of each image's split."""
    codes = np.full(len(ids), -1, np.int8)
    for split, table in zip(parts, tables, strict=True):
        rows = pc.unique(pc.index_in(table[IMAGE], value_set=ids.combine_chunks())).to_numpy()
        if (twice := rows[codes[rows] >= 0]).size:
            raise UserError(
                f"{file}: image {ids[int(twice[0])].as_py()!r} is in {SPLITS[codes[twice[0]]]} and in {split}; keep one"
            )
        codes[rows] = SPLITS.index(split)
    return codes


def _read_names(file: Location) -> tuple[dict[str, str], str]:
    """Return the name of each label code, and where the names come from."""
    beside = sorted(name for name in file.parent.names() if name.startswith(_NAMES) and name.endswith(".csv"))
    if not beside:
        return {}, f"no {_NAMES}*.csv beside it, so labels keep their codes"
    if len(beside) > 1:
        raise UserError(f"{file.parent}: holds {first_few(beside)}; keep the one that belongs to {file.name}")
    content = read_data(file.parent / beside[0], "put it there")
    options = pv.ReadOptions(column_names=["code", "name"])
    kinds = pv.ConvertOptions(column_types={"code": pa.string(), "name": pa.string()})
    try:
        table = pv.read_csv(pa.BufferReader(content), options, convert_options=kinds)
    except pa.ArrowInvalid as error:
        raise UserError(f"{file.parent / beside[0]}: needs a code and a name in each row ({error})") from None
    table = table.filter(pc.not_equal(table["code"], LABEL))
    names = dict(zip(table["code"].to_pylist(), table["name"].to_pylist(), strict=True))
    return names, f"names from {beside[0]}"
