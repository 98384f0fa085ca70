"""A data set looked over: its labels and the facts about each image become numbers and findings.

Shapes: n images over all splits (train, val, test, in that order), S splits, C labels. Per-image data stays in arrow and numpy; only the
few images that a finding shows become Python objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..config import ExperimentConfig
from ..datasets.protocol import Splits
from ..labels.graph import LabelCounts, choose_tau, conditional_probability
from ..types import PRESENT, UNKNOWN, SampleTable
from .finding import SHOWN, Evidence, Finding, Gravity, Shown, SplitSummary
from .label_checks import TauRow, find_all, tau_row

FACTS = pa.schema(
    [
        ("row", pa.int64()),
        ("digest", pa.binary(16)),  # of the file's bytes; null where it cannot be read
        ("width", pa.int32()),  # pixels, upright; 0 where it cannot be decoded
        ("height", pa.int32()),
        ("num_bytes", pa.int64()),
        ("error", pa.string()),  # why it cannot be read or decoded; "" = sound
    ]
)
_BLOCK = 65_536  # rows tallied at once
TAUS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Diagnosis:
    """All that the report shows.

    Attributes:
        dataset, root: what was looked at.
        notes: the readers' lines.
        label_names: C names.
        splits: S summaries.
        findings: the gravest first.
        pairs: (label, label, images with both, P(second | first)), those that go together most often first.
        counts: of the train split.
        graph: counts that the label graph is made of.
        tau: threshold of the graph.
        taus: the graph at several thresholds.
        sizes: (what, [5] float: least, 5 %, median, 95 %, most) of the sound images.
        examples: a sound train image of each label, where there is one.
    """

    dataset: str
    root: str
    notes: tuple[str, ...]
    label_names: tuple[str, ...]
    splits: tuple[SplitSummary, ...]
    findings: tuple[Finding, ...]
    pairs: tuple[tuple[str, str, int, float], ...]
    counts: LabelCounts
    graph: LabelCounts
    tau: float
    taus: tuple[TauRow, ...]
    sizes: tuple[tuple[str, tuple[float, ...]], ...]
    examples: dict[str, Shown] = field(default_factory=dict)

    def number(self, gravity: Gravity) -> int:
        """How many findings of a gravity there are."""
        return sum(finding.gravity == gravity for finding in self.findings)


def all_samples(splits: Splits) -> pa.Table:
    """The images of all splits, train before val before test: [n] rows of `image_id`, `uri`, `target`."""
    return pa.concat_tables([table.table for _, table in _parts(splits)])


def diagnose(
    splits: Splits,
    facts: pa.Table,
    config: ExperimentConfig,
    *,
    counts: LabelCounts,
    graph: LabelCounts,
    missing_words: Sequence[str] = (),
    left_out: pa.Table | None = None,
) -> Diagnosis:
    """Looks for everything that is known to go wrong.

    Args:
        splits: as training uses them.
        facts: of schema `FACTS`, one row for each row of `all_samples(splits)`, in any order.
        config: what training would be started with.
        counts: of the train split.
        graph: what the label graph is made of; `counts`, or those of `data.label_counts`.
        missing_words: labels without a word vector.
        left_out: `uri` of the images without a label that the settings leave out of the splits.
    """
    facts = facts.sort_by("row")
    evidence = _gather(splits, facts, config)
    probability = conditional_probability(graph)
    tau = choose_tau(graph, config.model.tau, config.model.tau_degree)
    return Diagnosis(
        dataset=config.data.dataset,
        root=config.data.root or "generated",
        notes=splits.notes,
        label_names=evidence.label_names,
        splits=evidence.summaries,
        findings=tuple(
            find_all(evidence, counts=counts, graph=graph, tau=tau, missing_words=missing_words, left_out=left_out)
        ),
        pairs=_pairs(counts),
        counts=counts,
        graph=graph,
        tau=tau,
        taus=tuple(tau_row(probability, value) for value in sorted({*TAUS, tau})),
        sizes=_size_table(facts),
        examples=_examples(evidence),
    )


def _parts(splits: Splits) -> list[tuple[str, SampleTable]]:
    named = (("train", splits.train), ("val", splits.val), ("test", splits.test))
    return [(name, table) for name, table in named if table is not None]


def _gather(splits: Splits, facts: pa.Table, config: ExperimentConfig) -> Evidence:
    parts = _parts(splits)
    start = np.cumsum([0, *(len(table) for _, table in parts)])
    assert len(facts) == start[-1], "one row of facts for each image"
    summaries, per_image = [], []
    for (name, table), first in zip(parts, start, strict=False):
        present, unknown = np.zeros((2, len(table.label_names)), np.int64)
        numbers = np.zeros(len(table), np.int32)
        targets = table.targets
        for begin in range(0, len(table), _BLOCK):
            block = targets[begin : begin + _BLOCK]
            present += (block == PRESENT).sum(0)
            unknown += (block == UNKNOWN).sum(0)
            # -1 stands for an image without a label, not even an unknown one
            known = (block == PRESENT).sum(1, dtype=np.int32)
            numbers[begin : begin + _BLOCK] = np.where(block.any(1), known, -1)
        own = facts.slice(first, len(table))
        summaries.append(
            SplitSummary(
                name,
                table.source,
                len(table),
                int(np.count_nonzero(numbers == -1)),
                int(pc.sum(pc.not_equal(own["error"], "")).as_py()),
                int(pc.sum(own["num_bytes"]).as_py()),
                present,
                unknown,
                np.bincount(np.maximum(numbers, 0)),
            )
        )
        per_image.append(numbers)
    return Evidence(
        config,
        tuple(name for name, _ in parts),
        tuple(table for _, table in parts),
        all_samples(splits),
        start[:-1],
        facts,
        tuple(summaries),
        np.concatenate(per_image),
    )


def _pairs(counts: LabelCounts) -> tuple[tuple[str, str, int, float], ...]:
    probability = conditional_probability(counts)
    upper = np.triu(counts.cooccurrence)
    order = np.argsort(-upper, axis=None, kind="stable")[: 2 * SHOWN]
    rows, columns = np.unravel_index(order, upper.shape)
    found = []
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        if upper[row, column]:
            if counts.count[row] > counts.count[column]:  # given the rarer one: the direction that says more
                row, column = column, row
            together = int(counts.cooccurrence[row, column])
            found.append((counts.names[row], counts.names[column], together, float(probability[row, column])))
    return tuple(found)


def _size_table(facts: pa.Table) -> tuple[tuple[str, tuple[float, ...]], ...]:
    sound = facts.filter(pc.equal(facts["error"], ""))
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
        (what, tuple(np.quantile(values, [0, 0.05, 0.5, 0.95, 1]).tolist())) for what, values in measures.items()
    )


def _examples(evidence: Evidence) -> dict[str, Shown]:
    """The first sound train image of each label."""
    train = evidence.tables[0]
    sound = pc.equal(evidence.facts["error"], "").to_numpy()[: len(train)]
    targets = train.targets
    examples = {}
    for index, name in enumerate(train.label_names):
        rows = np.flatnonzero((targets[:, index] == PRESENT) & sound)[:1]
        if len(rows):
            (examples[name],) = evidence.show(rows)
    return examples
