"""What is known to go wrong with a data set, each kind found by one function, with what to do about it.

Shapes: n images over all splits (train, val, test, in that order), C labels. Per-image data stays in arrow and numpy; only the few
images that a finding shows become Python objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .config import ExperimentConfig
from .label_graph import LabelCounts, choose_tau, conditional_probability
from .types import SampleTable

Gravity = Literal["error", "warning", "info"]
GRAVITIES: tuple[Gravity, ...] = ("error", "warning", "info")

SHOWN = 12  # images and names that a finding shows
_ENOUGH = 5  # images from which on "always together" is more than a coincidence
_FEW = 10  # images below which neither training nor AP says much of a label
_UNEVEN = 100  # most frequent label / rarest label
_UNLABELLED = 0.05  # share of a split; COCO has 0.8 %
_ENLARGED = 8  # times: an image stretched more than this holds next to nothing
_ELONGATED = 4  # long side / short side, from which on the square input distorts much
_DENSE = 0.5  # share of all pairs: with more edges the graph tells labels apart no longer


@dataclass(frozen=True)
class Shown:
    """An image that a finding shows: `split: file`, and where it lies."""

    caption: str
    uri: str


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        gravity: `error` makes training stop or its scores wrong, `warning` costs quality, `info` is good to know.
        title: what was found, with numbers.
        mend: what to do about it.
        details: names, the first few.
        images: some of the images concerned.
    """

    gravity: Gravity
    title: str
    mend: str
    details: tuple[str, ...] = ()
    images: tuple[Shown, ...] = ()


@dataclass(frozen=True)
class SplitSummary:
    """One split in numbers.

    Attributes:
        name, source: `train`, `val` or `test`, and what was read.
        num_images, num_unlabelled, num_unreadable, num_bytes: of its images.
        present, unknown: [C] int64, images with the label, and images where it is unknown.
        labels_per_image: [K] int64, images with 0, 1, ..., K - 1 labels.
    """

    name: str
    source: str
    num_images: int
    num_unlabelled: int
    num_unreadable: int
    num_bytes: int
    present: npt.NDArray[np.int64]
    unknown: npt.NDArray[np.int64]
    labels_per_image: npt.NDArray[np.int64]

    @property
    def mean_labels(self) -> float:
        """Labels of an image on average."""
        return float(self.present.sum() / self.num_images)


@dataclass(frozen=True)
class TauRow:
    """The graph at one threshold: edges between different labels, edges a label, labels without any edge."""

    tau: float
    num_edges: int
    mean_degree: float
    num_alone: int


@dataclass(frozen=True)
class Evidence:
    """Labels and facts side by side; `start[s]` is the first row of split s, `facts` has a row for each image."""

    config: ExperimentConfig
    names: tuple[str, ...]
    tables: tuple[SampleTable, ...]
    samples: pa.Table
    start: npt.NDArray[np.int64]
    facts: pa.Table
    summaries: tuple[SplitSummary, ...]
    per_image: npt.NDArray[np.int32]

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.tables[0].label_names

    def split_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.searchsorted(self.start, rows, side="right") - 1

    def show(self, rows: npt.NDArray[np.int64]) -> tuple[Shown, ...]:
        """The first few of these images."""
        rows = rows[:SHOWN]
        uris = self.samples["uri"].take(pa.array(rows)).to_pylist()
        return tuple(
            Shown(f"{self.names[split]}: {uri}", uri) for split, uri in zip(self.split_of(rows), uris, strict=True)
        )


def find_all(
    evidence: Evidence,
    *,
    counts: LabelCounts,
    graph: LabelCounts,
    tau: float,
    missing_words: Sequence[str],
    left_out: pa.Table | None,
) -> list[Finding]:
    """Every finding, the gravest first; see `doctor.diagnose` for the arguments."""
    found = [
        *_unreadable(evidence),
        *_copies(evidence),
        *_labels_without_images(evidence),
        *_labels_together(counts),
        *_unlabelled(evidence, left_out),
        *_balance(evidence),
        *_sizes(evidence),
        *_graph(graph, tau, evidence.config),
        *_word_vectors(missing_words, evidence.config),
    ]
    return sorted(found, key=lambda finding: GRAVITIES.index(finding.gravity))


def tau_row(probability: npt.NDArray[np.float64], tau: float) -> TauRow:
    """The graph at one threshold; probability: [C, C] as `conditional_probability` gives it."""
    edge = probability >= tau
    num_edges = int(np.count_nonzero(edge))
    alone = int(np.count_nonzero(~(edge.any(0) | edge.any(1))))
    return TauRow(tau, num_edges, num_edges / len(probability), alone)


def _few(names: Sequence[str], number: int | None = None) -> tuple[str, ...]:
    """The first names, and how many more of `number` there are (None: of the names given)."""
    more = (len(names) if number is None else number) - SHOWN
    return (*names[:SHOWN], *([f"... and {more:,} more"] if more > 0 else []))


def _listed(names: Sequence[str]) -> tuple[str, ...]:
    """The first names in one line."""
    return (", ".join(_few(names)),)


def _plural(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _unreadable(evidence: Evidence) -> Iterator[Finding]:
    for index, summary in enumerate(evidence.summaries):
        if not summary.num_unreadable:
            continue
        errors = evidence.facts["error"].slice(evidence.start[index], summary.num_images)
        rows = np.flatnonzero(pc.not_equal(errors, "").to_numpy()) + evidence.start[index]
        shown = evidence.show(rows)
        reasons = evidence.facts["error"].take(pa.array(rows[:SHOWN])).to_pylist()
        details = [f"{one.uri} ({reason})" for one, reason in zip(shown, reasons, strict=True)]
        limit = evidence.config.data.max_bad_fraction
        stops = summary.num_unreadable > limit * summary.num_images
        yield Finding(
            "error" if stops else "warning",
            f"{_plural(summary.num_unreadable, 'image')} of {summary.name} cannot be read"
            f" ({summary.num_unreadable / summary.num_images:.2%})",
            "download or convert them again, or take them out of the list; "
            + (
                f"more than data.max_bad_fraction={limit} allows, training would stop"
                if stops
                else "training leaves them out"
            ),
            _few(details, len(rows)),
            shown,
        )


def _copies(evidence: Evidence) -> Iterator[Finding]:
    """Images with the same bytes: across splits, with other labels, or plainly twice."""
    sound = pc.equal(evidence.facts["error"], "").to_numpy()
    codes = pc.fill_null(evidence.facts["digest"].combine_chunks().dictionary_encode().indices, -1).to_numpy()
    codes = np.where(sound, codes, -1)
    often = np.bincount(codes[sound], minlength=1) > 1
    rows = np.flatnonzero(sound & often[codes])
    if not len(rows):
        return
    rows = rows[np.argsort(codes[rows], kind="stable")]  # groups of copies, one after the other
    first = np.flatnonzero(np.diff(codes[rows], prepend=-1))
    length = np.diff(first, append=len(rows))
    split = evidence.split_of(rows)
    crossing = np.minimum.reduceat(split, first) != np.maximum.reduceat(split, first)
    flat = evidence.samples["target"].take(pa.array(rows)).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    targets = flat.reshape(len(rows), -1)
    differing = (targets != targets[first].repeat(length, 0)).any(1)
    contradicting = np.logical_or.reduceat(differing, first)

    def number(chosen: npt.NDArray[np.bool_]) -> int:
        return int(np.count_nonzero(chosen))

    def groups(chosen: npt.NDArray[np.bool_]) -> tuple[tuple[str, ...], tuple[Shown, ...]]:
        picked = [rows[first[group] : first[group] + length[group]] for group in np.flatnonzero(chosen)[:SHOWN]]
        lines = [" = ".join(_few([one.caption for one in evidence.show(group)], len(group))) for group in picked]
        return _few(lines, number(chosen)), evidence.show(np.concatenate(picked))

    if crossing.any():
        between = [
            f"{one} and {other}: {shared}"
            for position, one in enumerate(evidence.names)
            for index, other in enumerate(evidence.names[position + 1 :], position + 1)
            if (shared := _shared(split, first, (position, index)))
        ]
        yield Finding(
            "error",
            f"{_plural(number(crossing), 'image')} in more than one split ({', '.join(between)})",
            "keep each in one split: scores on images that were trained on are too high",
            *groups(crossing),
        )
    if contradicting.any():
        yield Finding(
            "warning",
            f"{_plural(number(contradicting), 'image')} more than once with different labels",
            "keep the copy with the right labels",
            *groups(contradicting),
        )
    plain = ~crossing & ~contradicting
    if plain.any():
        extra = int((length[plain] - 1).sum())
        yield Finding(
            "warning",
            f"{_plural(number(plain), 'image')} more than once in the same split, {extra:,} copies too many",
            "keep one of each: copies weigh more than other images, in the loss and in the score",
            *groups(plain),
        )


def _shared(split: npt.NDArray[np.int64], first: npt.NDArray[np.int64], pair: tuple[int, int]) -> int:
    """Groups of copies that have an image in both splits."""
    one, other = (np.logical_or.reduceat(split == index, first) for index in pair)
    return int(np.count_nonzero(one & other))


def _labels_without_images(evidence: Evidence) -> Iterator[Finding]:
    for summary in evidence.summaries:
        empty = [name for name, number in zip(evidence.label_names, summary.present, strict=True) if not number]
        if empty:
            yield Finding(
                "warning",
                f"{_plural(len(empty), 'label')} without an image in {summary.name}",
                "add images with them, or take the labels out of the data set: they cannot be learnt"
                if summary.name == "train"
                else "their AP is nan and left out of mAP; add images with them, or split anew",
                _listed(empty),
            )
    train = evidence.summaries[0]
    known = train.num_images - train.unknown
    always = [
        name
        for name, number, out_of in zip(evidence.label_names, train.present, known, strict=True)
        if number == out_of and number >= _ENOUGH
    ]
    if always:
        yield Finding(
            "warning",
            f"{_plural(len(always), 'label')} on every train image where known",
            "add images without them, or take the labels out: there is nothing to tell apart",
            _listed(always),
        )


def _labels_together(counts: LabelCounts) -> Iterator[Finding]:
    probability = conditional_probability(counts)  # [r, c] = P(c | r)
    given = (probability == 1) & (counts.count[:, None] >= _ENOUGH)
    twins = [
        f"{counts.names[one]} = {counts.names[other]} ({counts.count[one]} images)"
        for one, other in np.argwhere(np.triu(given & given.T))
    ]
    if twins:
        yield Finding(
            "warning",
            f"{_plural(len(twins), 'pair')} of labels that always occur together",
            "make one label of each pair, or add images with one of the two alone: nothing can tell them apart",
            _few(twins),
        )
    implied = [
        f"{counts.names[row]} -> {counts.names[column]} ({counts.count[row]} images)"
        for row, column in np.argwhere(given & ~given.T)
    ]
    if implied:
        yield Finding(
            "info",
            f"{_plural(len(implied), 'label')} never without another",
            "fine where one is a kind or part of the other; the label graph uses it. Else add images with it alone",
            _few(implied),
        )


def _unlabelled(evidence: Evidence, left_out: pa.Table | None) -> Iterator[Finding]:
    mend = "check that their labels were not forgotten; images that really show none of the labels are worth keeping"
    for index, summary in enumerate(evidence.summaries):
        if summary.num_unlabelled:
            own = evidence.per_image[evidence.start[index] :][: summary.num_images]
            rows = np.flatnonzero(own == -1) + evidence.start[index]
            shown = evidence.show(rows)
            yield Finding(
                "warning" if summary.num_unlabelled > _UNLABELLED * summary.num_images else "info",
                f"{_plural(summary.num_unlabelled, 'image')} of {summary.name} without a label"
                f" ({summary.num_unlabelled / summary.num_images:.2%})",
                mend,
                _few([one.uri for one in shown], len(rows)),
                shown,
            )
    if left_out is not None and len(left_out):
        uris = left_out["uri"].slice(0, SHOWN).to_pylist()
        yield Finding(
            "warning" if len(left_out) > _UNLABELLED * len(evidence.samples) else "info",
            f"{_plural(len(left_out), 'image')} left out for want of a label",
            f"{mend} (data.keep_unlabelled_train, data.keep_unlabelled_eval)",
            _few(uris, len(left_out)),
            tuple(Shown(f"left out: {uri}", uri) for uri in uris),
        )


def _balance(evidence: Evidence) -> Iterator[Finding]:
    train = evidence.summaries[0]
    order = np.argsort(train.present, kind="stable")
    few = [
        f"{evidence.label_names[index]} ({train.present[index]})" for index in order if 0 < train.present[index] < _FEW
    ]
    if few:
        yield Finding(
            "info",
            f"{_plural(len(few), 'label')} with fewer than {_FEW} train images",
            "add images, or merge with a kindred label; with few images in all, keep the backbone as it is "
            "(model.frozen_stages 5)",
            _listed(few),
        )
    seen = train.present[train.present > 0]
    if len(seen) and seen.max() >= _UNEVEN * seen.min():
        most, least = int(train.present.argmax()), int(np.where(train.present > 0, train.present, seen.max()).argmin())
        yield Finding(
            "info",
            f"uneven labels: {evidence.label_names[most]} is {seen.max() / seen.min():,.0f} times as frequent as "
            f"{evidence.label_names[least]}",
            "look at the AP of each label (msrn evaluate), not at OF1 alone; model.prior_bias starts each label at its own rate",
        )
    unknown = [f"{summary.name} {number:,}" for summary in evidence.summaries if (number := int(summary.unknown.sum()))]
    if unknown:
        yield Finding(
            "info",
            f"labels of images that are unknown (-1): {', '.join(unknown)}",
            "nothing to do: they are left out of the loss, the label graph and the metrics",
        )


def _sizes(evidence: Evidence) -> Iterator[Finding]:
    width, height = (evidence.facts[name].to_numpy() for name in ("width", "height"))
    short, long = np.minimum(width, height), np.maximum(width, height)
    size = evidence.config.data.image_size
    sound = short > 0
    tiny = np.flatnonzero(sound & (short * _ENLARGED < size))
    if len(tiny):
        yield Finding(
            "warning",
            f"{_plural(len(tiny), 'image')} enlarged more than {_ENLARGED} times (short side below {size / _ENLARGED:g} pixels)",
            "look whether they show anything; take larger versions, or leave them out",
            _few([one.uri for one in evidence.show(tiny)], len(tiny)),
            evidence.show(tiny),
        )
    if sound.any() and np.median(short[sound]) < size:
        yield Finding(
            "info",
            f"half of the images or more are smaller than the network's input (data.image_size={size})",
            "a smaller data.image_size costs less time and loses nothing of them",
        )
    stretched = np.flatnonzero(sound & (long >= _ELONGATED * short))
    if len(stretched):
        yield Finding(
            "info",
            f"{_plural(len(stretched), 'image')} {_ELONGATED} times as long as wide, or more",
            "they are squeezed into a square for scoring; cut them into parts if their objects matter",
            _few([one.uri for one in evidence.show(stretched)], len(stretched)),
            evidence.show(stretched),
        )


def _graph(graph: LabelCounts, tau: float, config: ExperimentConfig) -> Iterator[Finding]:
    row = tau_row(conditional_probability(graph), tau)
    num_pairs = len(graph.names) * (len(graph.names) - 1)
    if row.num_edges == 0:
        auto = choose_tau(graph, "auto", config.model.tau_degree)
        yield Finding(
            "warning",
            f"the label graph is empty at tau {tau:.4g}: every label attends to itself alone",
            f"take --model.tau auto (here {auto:.4g})"
            if tau_row(conditional_probability(graph), auto).num_edges
            else "no two labels occur together: a plain classifier (--model.name gap) does as well",
        )
    elif num_pairs > 2 and row.num_edges > _DENSE * num_pairs:
        yield Finding(
            "info",
            f"the label graph is dense at tau {tau:.4g}: {row.num_edges} of {num_pairs} possible edges",
            "a higher model.tau, or auto, keeps the strong ones",
        )


def _word_vectors(missing: Sequence[str], config: ExperimentConfig) -> Iterator[Finding]:
    if missing:
        stops = config.data.missing_words == "error"
        yield Finding(
            "error" if stops else "info",
            f"{_plural(len(missing), 'label')} without a word vector",
            "training would stop; rename them, or choose --data.missing-words random or --data.word-vectors learned"
            if stops
            else f"they get {config.data.missing_words} vectors (data.missing_words); rename them for real ones",
            _listed(missing),
        )
