"""Known problems of labels, label graph and word vectors, and the list of all findings. C labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..config import ExperimentConfig
from ..labels.graph import LabelCounts, choose_tau, conditional_probability
from .finding import SEVERITIES, DatasetFacts, Finding, LabelFacts, about_labels, plural, shorten
from .image_checks import copies, sizes, unlabelled_images, unreadable_images
from .label_names import twins_and_nothings

_ENOUGH = 5  # images from which on "always together" is more than a coincidence
_FEW = 10  # with fewer images, neither training nor AP says much about a label
_UNEVEN = 100  # most frequent label / rarest label
_DENSE = 0.5  # share of all pairs: with more edges the graph no longer distinguishes labels


@dataclass(frozen=True)
class TauRow:
    """The graph at one threshold: edges between different labels, edges per label, labels without any edge."""

    tau: float
    num_edges: int
    mean_degree: float
    num_alone: int


def find_all(dataset: DatasetFacts, labels: LabelFacts, tau: float, left_out: pa.Table | None) -> list[Finding]:
    """Return every finding, most severe first; see `diagnose` for the arguments."""
    findings = [
        *unreadable_images(dataset),
        *copies(dataset),
        *_labels_without_images(dataset),
        *_always_present(dataset),
        *twins_and_nothings(
            dataset.label_names, np.sum([summary.present for summary in dataset.summaries], axis=0).tolist()
        ),
        *_labels_together(labels.counts),
        *unlabelled_images(dataset, left_out),
        *_balance(dataset),
        *sizes(dataset),
        *_graph(labels.graph, tau, dataset.config),
        *_word_vectors(labels.missing_words, dataset.config),
    ]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def tau_row(probability: npt.NDArray[np.float64], tau: float) -> TauRow:
    """Return the graph at one threshold; probability: [C, C] as `conditional_probability` returns it."""
    edge = probability >= tau
    num_edges = int(np.count_nonzero(edge))
    num_alone = int(np.count_nonzero(~(edge.any(0) | edge.any(1))))
    return TauRow(tau, num_edges, num_edges / len(probability), num_alone)


def _labels_without_images(dataset: DatasetFacts) -> Iterator[Finding]:
    for summary in dataset.summaries:
        absent = [name for name, number in zip(dataset.label_names, summary.present, strict=True) if not number]
        fix = (
            "add images with them, or take the labels out of the data set: they cannot be learnt"
            if summary.name == "train"
            else "their AP is nan and left out of mAP; add images with them, or split the data differently"
        )
        yield from about_labels("warning", absent, f"without an image in {summary.name}", fix)


def _always_present(dataset: DatasetFacts) -> Iterator[Finding]:
    for summary in dataset.summaries:
        enough = _ENOUGH if summary.name == "train" else 1  # metrics leave the label out, however few images have it
        is_always = (summary.present == summary.num_images - summary.unknown) & (summary.present >= enough)
        always = [dataset.label_names[index] for index in np.flatnonzero(is_always)]
        fix = (
            "add images without them, or take the labels out: training has nothing to compare them with"
            if summary.name == "train"
            else "their AP is nan and left out of mAP; add images without them, or split the data differently"
        )
        yield from about_labels("warning", always, f"on every {summary.name} image where known", fix)


def _labels_together(counts: LabelCounts) -> Iterator[Finding]:
    probability = conditional_probability(counts)  # [r, c] = P(c | r)
    implies = (probability == 1) & (counts.count[:, None] >= _ENOUGH)

    def name_pairs(chosen: npt.NDArray[np.bool_], sign: str) -> list[str]:
        return [
            f"{counts.names[row]} {sign} {counts.names[column]} ({counts.count[row]} images)"
            for row, column in np.argwhere(chosen)
        ]

    if twins := name_pairs(np.triu(implies & implies.T), "="):
        yield Finding(
            "warning",
            f"{plural(len(twins), 'pair')} of labels that always occur together",
            "merge each pair into one label, or add images with only one of the two: the model cannot distinguish them",
            shorten(twins),
        )
    if implied := name_pairs(implies & ~implies.T, "->"):
        yield Finding(
            "info",
            f"{plural(len(implied), 'label')} never without another",
            "fine where one is a kind or part of the other; the label graph uses it. Else add images with it alone",
            shorten(implied),
        )


def _balance(dataset: DatasetFacts) -> Iterator[Finding]:
    names, present = dataset.label_names, dataset.summaries[0].present
    order = np.argsort(present, kind="stable")
    rare = [f"{names[index]} ({present[index]})" for index in order if 0 < present[index] < _FEW]
    yield from about_labels(
        "info",
        rare,
        f"with fewer than {_FEW} train images",
        "add images, or merge with a similar label; if the data set is small, freeze the backbone (model.frozen_stages 5)",
    )
    seen = [index for index in order if present[index]]
    if seen and present[seen[-1]] >= _UNEVEN * present[seen[0]]:
        most, least = int(present.argmax()), seen[0]
        yield Finding(
            "info",
            f"uneven labels: {names[most]} is {present[most] / present[least]:,.0f} times as frequent as {names[least]}",
            "look at the AP of each label (msrn evaluate), not at OF1 alone;"
            " model.prior_bias starts each label at its own frequency",
        )
    unknown = [f"{summary.name} {number:,}" for summary in dataset.summaries if (number := int(summary.unknown.sum()))]
    if unknown:
        yield Finding(
            "info",
            f"labels that are unknown (-1): {', '.join(unknown)}",
            "nothing to do: the loss, the label graph and the metrics leave them out",
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
            "a higher model.tau, or auto, keeps only the strong edges",
        )


def _word_vectors(missing: Sequence[str], config: ExperimentConfig) -> Iterator[Finding]:
    stops = config.data.missing_words == "error"
    fix = (
        "training would stop; rename them, or choose --data.missing-words random or --data.word-vectors learned"
        if stops
        else f"they get {config.data.missing_words} vectors (data.missing_words); rename them to get real vectors"
    )
    yield from about_labels("error" if stops else "info", missing, "without a word vector", fix)
