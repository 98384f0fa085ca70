"""What is known to go wrong with a data set, each kind found by one function, with what to do about it.

Those of images are in `image_findings`; here are those of labels, label graph and word vectors. C labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..config import ExperimentConfig
from ..labels.graph import LabelCounts, choose_tau, conditional_probability
from .finding import GRAVITIES, Evidence, Finding, few, listed, plural
from .image_checks import copies, sizes, unlabelled_images, unreadable_images

_ENOUGH = 5  # images from which on "always together" is more than a coincidence
_FEW = 10  # images below which neither training nor AP says much of a label
_UNEVEN = 100  # most frequent label / rarest label
_DENSE = 0.5  # share of all pairs: with more edges the graph tells labels apart no longer


@dataclass(frozen=True)
class TauRow:
    """The graph at one threshold: edges between different labels, edges a label, labels without any edge."""

    tau: float
    num_edges: int
    mean_degree: float
    num_alone: int


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
        *unreadable_images(evidence),
        *copies(evidence),
        *_labels_without_images(evidence),
        *_labels_together(counts),
        *unlabelled_images(evidence, left_out),
        *_balance(evidence),
        *sizes(evidence),
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


def _labels_without_images(evidence: Evidence) -> Iterator[Finding]:
    for summary in evidence.summaries:
        empty = [name for name, number in zip(evidence.label_names, summary.present, strict=True) if not number]
        if empty:
            yield Finding(
                "warning",
                f"{plural(len(empty), 'label')} without an image in {summary.name}",
                "add images with them, or take the labels out of the data set: they cannot be learnt"
                if summary.name == "train"
                else "their AP is nan and left out of mAP; add images with them, or split anew",
                listed(empty),
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
            f"{plural(len(always), 'label')} on every train image where known",
            "add images without them, or take the labels out: there is nothing to tell apart",
            listed(always),
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
            f"{plural(len(twins), 'pair')} of labels that always occur together",
            "make one label of each pair, or add images with one of the two alone: nothing can tell them apart",
            few(twins),
        )
    implied = [
        f"{counts.names[row]} -> {counts.names[column]} ({counts.count[row]} images)"
        for row, column in np.argwhere(given & ~given.T)
    ]
    if implied:
        yield Finding(
            "info",
            f"{plural(len(implied), 'label')} never without another",
            "fine where one is a kind or part of the other; the label graph uses it. Else add images with it alone",
            few(implied),
        )


def _balance(evidence: Evidence) -> Iterator[Finding]:
    train = evidence.summaries[0]
    order = np.argsort(train.present, kind="stable")
    rare = [
        f"{evidence.label_names[index]} ({train.present[index]})" for index in order if 0 < train.present[index] < _FEW
    ]
    if rare:
        yield Finding(
            "info",
            f"{plural(len(rare), 'label')} with fewer than {_FEW} train images",
            "add images, or merge with a kindred label; with few images in all, keep the backbone as it is "
            "(model.frozen_stages 5)",
            listed(rare),
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
            f"{plural(len(missing), 'label')} without a word vector",
            "training would stop; rename them, or choose --data.missing-words random or --data.word-vectors learned"
            if stops
            else f"they get {config.data.missing_words} vectors (data.missing_words); rename them for real ones",
            listed(missing),
        )
