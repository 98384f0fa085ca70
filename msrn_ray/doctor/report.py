"""`msrn doctor`: a diagnosis on the terminal and as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ..datasets.transforms import decode
from ..errors import UserError
from ..io.byte_ranges import read_bytes
from ..io.files import write_output
from ..labels.graph import conditional_probability
from ..labels.graph_plot import draw_graph
from .diagnosis import Diagnosis
from .finding import SEVERITIES, Severity, plural

_COLOURS: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "info": "cyan"}
_LABEL_ROWS = 60  # labels that the terminal lists; the page lists all
_BAR = 30  # characters of the longest bar
_THUMBNAIL = 96  # pixels of the longer side
_HEAT_MAP = 120  # with more labels the page draws no heat map: its cells would be too small


def print_diagnosis(out: Console, diagnosis: Diagnosis) -> None:
    """Print the numbers, then the findings, most severe first."""
    for note in diagnosis.notes:
        out.print(note, markup=False)
    out.print("the first train images as read (a label with ? is unknown):")
    for image, labels in diagnosis.first_rows:
        out.print(f"    {image}: {labels}", markup=False)
    for table in _tables(diagnosis):
        out.print(table)
    for finding in diagnosis.findings:
        out.print(f"[{_COLOURS[finding.severity]}]{finding.severity}[/] {escape(finding.title)}")
        for line in finding.details:
            out.print(f"    {line}", markup=False)
        out.print(f"  -> {finding.fix}", markup=False)
    out.print(summary_line(diagnosis), markup=False)


def summary_line(diagnosis: Diagnosis) -> str:
    """Return the number of findings of each severity, in one line."""
    counts = [(severity, diagnosis.num_findings(severity)) for severity in SEVERITIES]
    words = [
        f"{number} info" if severity == "info" else plural(number, severity) for severity, number in counts if number
    ]
    return f"findings: {', '.join(words) or 'none'}"


def write_page(path: Path, diagnosis: Diagnosis, max_pixels: int) -> None:
    """Write the page; thumbnails and plots are inside it.

    Args:
        path: an .html file.
        diagnosis: what to show.
        max_pixels: larger images get no thumbnail.

    Raises:
        UserError: if the file cannot be written.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["short"] = _short
    template = environment.from_string(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    plot = io.BytesIO()
    draw_graph(diagnosis.graph, diagnosis.tau, plot)
    page = template.render(
        diagnosis=diagnosis,
        summary=summary_line(diagnosis),
        thumbnail=cache(lambda uri: _thumbnail(uri, max_pixels)),
        labels=_label_rows(diagnosis),
        per_image=_per_image_rows(diagnosis),
        origin=_origin(diagnosis),
        margin=1 + 0.45 * min(20, max(map(len, diagnosis.counts.names))),
        heat_map=_heat_map(diagnosis) if len(diagnosis.counts.names) <= _HEAT_MAP else [],
        graph=_data_uri(plot.getvalue(), "png"),
    )
    with write_output(path) as partial:
        partial.write_text(page, encoding="utf-8")


def _tables(diagnosis: Diagnosis) -> Iterator[Table]:
    names = [split.name for split in diagnosis.splits]
    sources = Column("from", overflow="fold")
    yield _table(
        "images",
        ("split", "images", "without label", "unreadable", "labels per image", "MB", sources),
        (
            (
                split.name,
                f"{split.num_images:,}",
                f"{split.num_unlabelled:,}",
                f"{split.num_unreadable:,}",
                f"{split.mean_labels:.2f}",
                f"{split.num_bytes / 1e6:,.1f}",
                split.source,
            )
            for split in diagnosis.splits
        ),
    )
    yield _table("images with each label", ("label", *names, "train"), _label_cells(diagnosis))
    per_image = ((f"{row['number']}", *(f"{count:,}" for count in row["counts"])) for row in _per_image_rows(diagnosis))
    yield _table("images by number of labels", ("labels", *names), per_image)
    pairs = (
        (f"{first}, {second}", f"{num_both:,}", f"{probability:.2f}")
        for first, second, num_both, probability in diagnosis.pairs[: _LABEL_ROWS // 5]
    )
    yield _table("labels that occur together most often (train)", ("pair", "images", "P(second | first)"), pairs)
    taus = (
        (
            f"{row.tau:.4g}{' *' if row.tau == diagnosis.tau else ''}",
            f"{row.num_edges:,}",
            f"{row.mean_degree:.2f}",
            f"{row.num_alone}",
        )
        for row in diagnosis.taus
    )
    headings = ("tau", "edges", "edges per label", "labels without edges")
    yield _table(f"label graph, counted on {_origin(diagnosis)}", headings, taus)
    sizes = ((measure, *map(_short, values)) for measure, values in diagnosis.sizes)
    yield _table("sizes", ("", "minimum", "5 %", "median", "95 %", "maximum"), sizes)


def _table(title: str, headings: Iterable[str | Column], rows: Iterable[Iterable[str]]) -> Table:
    """Return a table for the terminal; title and cells are shown as they are, without markup."""
    table = Table(*headings, title=escape(title))
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _label_cells(diagnosis: Diagnosis) -> list[tuple[str, ...]]:
    """Return a row per label; from the middle of many rows, only their number."""
    rows: list[tuple[str, ...]] = []
    for row in _label_rows(diagnosis):
        bar = "█" * round(_BAR * row["share"]) or ("▏" if row["numbers"][0] else "")
        rows.append((row["name"], *(f"{number:,}" for number in row["numbers"]), bar))
    half = _LABEL_ROWS // 2
    if len(rows) > _LABEL_ROWS:
        rows[half:-half] = [(f"... {len(rows) - _LABEL_ROWS} more", *[""] * (len(diagnosis.splits) + 1))]
    return rows


def _origin(diagnosis: Diagnosis) -> str:
    """Return what the label graph was counted on."""
    return str(diagnosis.graph.provenance or "a file that does not name its images")


def _label_rows(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """Return a row per label, most frequent in train first; `numbers` by split, `unknown` in all splits, `share` of the first row."""
    train = diagnosis.splits[0].present
    return [
        {
            "name": diagnosis.counts.names[index],
            "numbers": [int(split.present[index]) for split in diagnosis.splits],
            "unknown": int(sum(split.unknown[index] for split in diagnosis.splits)),
            "share": float(train[index] / max(1, train.max())),
            "example": diagnosis.examples.get(diagnosis.counts.names[index]),
        }
        for index in np.argsort(-train, kind="stable")
    ]


def _per_image_rows(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """Return a row for each number of labels that an image has: `number`, `counts` by split, `share` of the largest in train."""
    per_split = [split.labels_per_image.tolist() for split in diagnosis.splits]
    rows = enumerate(itertools.zip_longest(*per_split, fillvalue=0))
    return [{"number": number, "counts": row, "share": row[0] / max(per_split[0])} for number, row in rows if any(row)]


def _heat_map(diagnosis: Diagnosis) -> list[tuple[int, int, float, str]]:
    """Return (column, row, P, tooltip) of each pair that occurs together in train; row r, column c show P(c | r)."""
    probability = conditional_probability(diagnosis.counts)
    names = diagnosis.counts.names
    return [
        (int(c), int(r), round(float(probability[r, c]), 3), f"P({names[c]} | {names[r]}) = {probability[r, c]:.2f}")
        for r, c in np.argwhere(probability > 0)
    ]


def _thumbnail(uri: str, max_pixels: int) -> str | None:
    """Return a small JPEG as a data URI; None where the image cannot be shown."""
    try:
        pixels = decode(read_bytes(uri), max_pixels=max_pixels)
    except (UserError, OSError):
        return None  # the page shows "unreadable" instead
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=80)
    return _data_uri(stream.getvalue(), "jpeg")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _short(value: float) -> str:
    """Return a number with three significant digits; from 100 on as a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
