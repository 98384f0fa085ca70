"""Checks a data set: turns its labels and the facts about each image into numbers and findings.

Shapes: n images over all splits (train, val, test, in that order), S splits, C labels. Per-image data stays in arrow and numpy;
only the few images that a finding shows become Python objects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..config import ExperimentConfig
from ..datasets.protocol import Splits
from ..labels.graph import LabelCounts, choose_tau, conditional_probability
from ..types import PRESENT, UNKNOWN, SampleTable
from .finding import MAX_SHOWN, DatasetFacts, Finding, LabelFacts, Severity, ShownImage, SplitSummary
from .label_checks import TauRow, find_all, tau_row

FACTS = pa.schema(
    [
        ("row", pa.int64()),
        ("digest", pa.binary(16)),  # of the file's bytes; null where the file cannot be read
        ("width", pa.int32()),  # pixels, upright; 0 where the image cannot be decoded
        ("height", pa.int32()),
        ("num_bytes", pa.int64()),
        ("error", pa.string()),  # why the image cannot be read or decoded; "" for a sound image
    ]
)
_SHOWN_ROWS = 5
_BLOCK = 2**16  # rows counted at once
TAUS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Diagnosis:
    """Everything that the report shows.

    Attributes:
        dataset, root: the data set.
        notes: notes of its reader.
        first_rows: (image, its labels) of the first images of train, as they were read.
        splits: S summaries.
        findings: most severe first.
        pairs: (label, label, images with both, P(second | first)), most frequent first.
        counts: label counts of the train split; they hold the C label names.
        graph: counts that the label graph is made from.
        tau: threshold of the graph.
        taus: the graph at several thresholds.
        sizes: (measure, [5] float: minimum, 5 %, median, 95 %, maximum) of the sound images.
        examples: a sound train image of each label that has one.
    """

    dataset: str
    root: str
    notes: tuple[str, ...]
    first_rows: tuple[tuple[str, str], ...]
    splits: tuple[SplitSummary, ...]
    findings: tuple[Finding, ...]
    pairs: tuple[tuple[str, str, int, float], ...]
    counts: LabelCounts
    graph: LabelCounts
    tau: float
    taus: tuple[TauRow, ...]
    sizes: tuple[tuple[str, tuple[float, ...]], ...]
    examples: dict[str, ShownImage]

    def num_findings(self, severity: Severity) -> int:
        """Return the number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)


def all_samples(splits: Splits) -> pa.Table:
    """Return the images of all splits, train before val before test: [n] rows of `image_id`, `uri`, `target`."""
    return pa.concat_tables([table.table for table in splits.tables.values()])


def diagnose(
    splits: Splits, images: pa.Table, config: ExperimentConfig, labels: LabelFacts, left_out: pa.Table | None = None
) -> Diagnosis:
    """Look for every known problem.

    Args:
        splits: as training uses them.
        images: of schema `FACTS`, one row for each row of `all_samples(splits)`, in any order.
        config: the config that training would use.
        labels: label counts and labels without a word vector.
        left_out: `uri` of the images without a label that the settings leave out of the splits.
    """
    dataset = _gather(splits, images.sort_by("row"), config)
    graph = labels.graph
    probability = conditional_probability(graph)
    tau = choose_tau(graph, config.model.tau, config.model.tau_degree)
    return Diagnosis(
        dataset=config.data.dataset,
        root=config.data.root or "generated",
        notes=splits.notes,
        first_rows=_first_rows(splits.train),
        splits=dataset.summaries,
        findings=tuple(find_all(dataset, labels, tau, left_out)),
        pairs=_pairs(labels.counts),
        counts=labels.counts,
        graph=graph,
        tau=tau,
        taus=tuple(tau_row(probability, value) for value in sorted({*TAUS, tau})),
        sizes=_size_table(dataset.images),
        examples=_examples(dataset, splits.train),
    )


def _first_rows(train: SampleTable) -> tuple[tuple[str, str], ...]:
    rows = train.take(np.arange(min(_SHOWN_ROWS, len(train))))
    labels = [
        [
            name + ("?" if value == UNKNOWN else "")
            for name, value in zip(rows.label_names, target, strict=True)
            if value
        ]
        for target in rows.targets
    ]
    return tuple(zip(rows.table["image_id"].to_pylist(), (" | ".join(names) or "-" for names in labels), strict=True))


def _gather(splits: Splits, images: pa.Table, config: ExperimentConfig) -> DatasetFacts:
    tables = splits.tables
    bounds = np.cumsum([0, *map(len, tables.values())])
    assert len(images) == bounds[-1], "one row of facts for each image"
    summaries = tuple(
        _summarize(name, table, images.slice(first, len(table)))
        for (name, table), first in zip(tables.items(), bounds, strict=False)
    )
    return DatasetFacts(
        config, tuple(tables), splits.train.label_names, all_samples(splits), bounds[:-1], images, summaries
    )


def _summarize(name: str, table: SampleTable, images: pa.Table) -> SplitSummary:
    """Return one split in numbers; images: its rows of schema `FACTS`."""
    targets = table.targets
    present, unknown = np.zeros((2, len(table.label_names)), np.int64)
    num_present = np.zeros(len(table), np.int64)
    for first in range(0, len(table), _BLOCK):
        block = targets[first : first + _BLOCK]
        is_present = block == PRESENT
        present += is_present.sum(0)
        unknown += (block == UNKNOWN).sum(0)
        num_present[first : first + _BLOCK] = is_present.sum(1)
    return SplitSummary(
        name,
        table.source,
        len(table),
        np.flatnonzero(~targets.any(1)),
        int(pc.sum(pc.not_equal(images["error"], "")).as_py()),
        int(pc.sum(images["num_bytes"]).as_py()),
        present,
        unknown,
        np.bincount(num_present),
    )


def _pairs(counts: LabelCounts) -> tuple[tuple[str, str, int, float], ...]:
    probability = conditional_probability(counts)
    upper = np.triu(counts.cooccurrence)
    order = np.argsort(-upper, axis=None, kind="stable")[: 2 * MAX_SHOWN]
    pairs = []
    for row, column in zip(*(places.tolist() for places in np.unravel_index(order, upper.shape)), strict=True):
        if upper[row, column]:
            if counts.count[row] > counts.count[column]:  # P(frequent | rare) says more than P(rare | frequent)
                row, column = column, row
            num_both = int(counts.cooccurrence[row, column])
            pairs.append((counts.names[row], counts.names[column], num_both, float(probability[row, column])))
    return tuple(pairs)


def _size_table(images: pa.Table) -> tuple[tuple[str, tuple[float, ...]], ...]:
    sound = images.filter(pc.equal(images["error"], ""))
    if not len(sound):
        return ()
    width, height = (sound[name].to_numpy().astype(np.float64) for name in ("width", "height"))
    measures = {
        "width, pixels": width,
        "height, pixels": height,
        "short side, pixels": np.minimum(width, height),
        "width / height": width / height,
        "file, KB": sound["num_bytes"].to_numpy() / 1000,
    }
    return tuple(
        (measure, tuple(np.quantile(values, [0, 0.05, 0.5, 0.95, 1]).tolist())) for measure, values in measures.items()
    )


def _examples(dataset: DatasetFacts, train: SampleTable) -> dict[str, ShownImage]:
    """Return the first sound train image of each label."""
    sound = pc.equal(dataset.images["error"], "").to_numpy()[: len(train)]
    columns = zip(train.label_names, train.targets.T, strict=True)
    rows = {name: np.flatnonzero((column == PRESENT) & sound)[:1] for name, column in columns}
    return {name: dataset.show(first)[0] for name, first in rows.items() if len(first)}
