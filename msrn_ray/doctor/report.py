"""`msrn doctor`: a diagnosis on the terminal and as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import itertools
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
from ..labels.graph import conditional_probability
from ..labels.graph_plot import draw_graph
from .diagnosis import Diagnosis
from .finding import SEVERITIES, Severity, ShownImage

_COLOURS: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "info": "cyan"}
_LABEL_ROWS = 60  # labels that the terminal lists; the page lists all
_BAR = 30  # characters of the longest bar
_THUMBNAIL = 96  # pixels of the longer side
_HEAT_MAP = 120  # with more labels the page draws no heat map: its cells would be too small


def print_diagnosis(out: Console, diagnosis: Diagnosis) -> None:
    """Print the numbers, then the findings, most severe first."""
    for note in diagnosis.notes:
        out.print(note, markup=False)
    for table in (
        _splits_table(diagnosis),
        _labels_table(diagnosis),
        _per_image_table(diagnosis),
        _pairs_table(diagnosis),
        _tau_table(diagnosis),
        _sizes_table(diagnosis),
    ):
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
        f"{number} {severity}{'' if number == 1 or severity == 'info' else 's'}"
        for severity, number in counts
        if number
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
    thumbnails: dict[str, str | None] = {}

    def thumbnail(image: ShownImage) -> str | None:
        if image.uri not in thumbnails:
            thumbnails[image.uri] = _thumbnail(image.uri, max_pixels)
        return thumbnails[image.uri]

    plot = io.BytesIO()
    draw_graph(diagnosis.graph, diagnosis.tau, plot)
    page = template.render(
        diagnosis=diagnosis,
        summary=summary_line(diagnosis),
        thumbnail=thumbnail,
        labels=_label_rows(diagnosis),
        per_image=_per_image_rows(diagnosis),
        origin=_origin(diagnosis),
        margin=1 + 0.45 * min(20, max(map(len, diagnosis.label_names))),
        heat_map=_heat_map(diagnosis) if len(diagnosis.label_names) <= _HEAT_MAP else [],
        graph=_data_uri(plot.getvalue(), "png"),
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def _splits_table(diagnosis: Diagnosis) -> Table:
    headings = ("split", "images", "without label", "unreadable", "labels per image", "MB")
    table = Table(*headings, Column("from", overflow="fold"), title="images")
    for split in diagnosis.splits:
        table.add_row(
            split.name,
            f"{split.num_images:,}",
            f"{split.num_unlabelled:,}",
            f"{split.num_unreadable:,}",
            f"{split.mean_labels:.2f}",
            f"{split.num_bytes / 1e6:,.1f}",
            escape(split.source),
        )
    return table


def _labels_table(diagnosis: Diagnosis) -> Table:
    table = Table("label", *(split.name for split in diagnosis.splits), "train", title="images with each label")
    rows = _label_rows(diagnosis)
    num_skipped = len(rows) - _LABEL_ROWS
    for place, row in enumerate(rows):
        if num_skipped > 0 and place == _LABEL_ROWS // 2:
            table.add_row(f"... {num_skipped} more", *[""] * (len(diagnosis.splits) + 1))
        if num_skipped <= 0 or not _LABEL_ROWS // 2 <= place < len(rows) - _LABEL_ROWS // 2:
            bar = "█" * round(_BAR * row["share"]) or ("▏" if row["numbers"][0] else "")
            table.add_row(escape(row["name"]), *(f"{number:,}" for number in row["numbers"]), bar)
    return table


def _per_image_table(diagnosis: Diagnosis) -> Table:
    table = Table("labels", *(split.name for split in diagnosis.splits), title="images by number of labels")
    for row in _per_image_rows(diagnosis):
        table.add_row(str(row["number"]), *(f"{count:,}" for count in row["counts"]))
    return table


def _pairs_table(diagnosis: Diagnosis) -> Table:
    table = Table("pair", "images", "P(second | first)", title="labels that occur together most often (train)")
    for first, second, num_both, probability in diagnosis.pairs[: _LABEL_ROWS // 5]:
        table.add_row(escape(f"{first}, {second}"), f"{num_both:,}", f"{probability:.2f}")
    return table


def _tau_table(diagnosis: Diagnosis) -> Table:
    title = escape(f"label graph, counted on {_origin(diagnosis)}")
    table = Table("tau", "edges", "edges per label", "labels without edges", title=title)
    for row in diagnosis.taus:
        mark = " *" if row.tau == diagnosis.tau else ""
        table.add_row(f"{row.tau:.4g}{mark}", f"{row.num_edges:,}", f"{row.mean_degree:.2f}", str(row.num_alone))
    return table


def _sizes_table(diagnosis: Diagnosis) -> Table:
    table = Table("", "minimum", "5 %", "median", "95 %", "maximum", title="sizes")
    for measure, values in diagnosis.sizes:
        table.add_row(measure, *(_short(value) for value in values))
    return table


def _origin(diagnosis: Diagnosis) -> str:
    """Return what the label graph was counted on."""
    return str(diagnosis.graph.provenance or "a file that does not name its images")


def _label_rows(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """Return a row per label, most frequent in train first; `numbers` by split, `unknown` in all splits, `share` of the first row."""
    train = diagnosis.splits[0].present
    return [
        {
            "name": diagnosis.label_names[index],
            "numbers": [int(split.present[index]) for split in diagnosis.splits],
            "unknown": int(sum(split.unknown[index] for split in diagnosis.splits)),
            "share": float(train[index] / max(1, train.max())),
            "example": diagnosis.examples.get(diagnosis.label_names[index]),
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
    names = diagnosis.label_names
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
