"""`msrn doctor`: a diagnosis on the terminal and as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
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
from .finding import GRAVITIES, Gravity, Shown

_COLOURS: dict[Gravity, str] = {"error": "bold red", "warning": "yellow", "info": "cyan"}
_LABEL_ROWS = 60  # labels that the terminal lists; the page lists all
_BAR = 30  # characters of the longest bar
_THUMBNAIL = 96  # pixels of the longer side
_HEAT_MAP = 120  # labels up to which the page draws every pair


def print_diagnosis(out: Console, diagnosis: Diagnosis) -> None:
    """Findings, the gravest first, then the numbers that they come from."""
    for note in diagnosis.notes:
        out.print(note, markup=False)
    table = Table(
        "split",
        "images",
        "without label",
        "unreadable",
        "labels an image",
        "MB",
        Column("from", overflow="fold"),
        title="images",
    )
    for one in diagnosis.splits:
        table.add_row(
            one.name,
            f"{one.num_images:,}",
            f"{one.num_unlabelled:,}",
            f"{one.num_unreadable:,}",
            f"{one.mean_labels:.2f}",
            f"{one.num_bytes / 1e6:,.1f}",
            escape(one.source),
        )
    out.print(table)
    _print_labels(out, diagnosis)

    longest = max(len(one.labels_per_image) for one in diagnosis.splits)
    table = Table("labels", *(one.name for one in diagnosis.splits), title="images by number of labels")
    for number in range(longest):
        row = [_at(one.labels_per_image, number) for one in diagnosis.splits]
        if any(row):
            table.add_row(str(number), *(f"{value:,}" for value in row))
    out.print(table)

    table = Table("pair", "images", "P(second | first)", title="labels that occur together most often (train)")
    for first, second, together, probability in diagnosis.pairs[: _LABEL_ROWS // 5]:
        table.add_row(escape(f"{first}, {second}"), f"{together:,}", f"{probability:.2f}")
    out.print(table)

    table = Table(
        "tau",
        "edges",
        "edges a label",
        "labels without one",
        title=escape(f"label graph, counted on {_origin(diagnosis)}"),
    )
    for at in diagnosis.taus:
        mark = " *" if at.tau == diagnosis.tau else ""
        table.add_row(f"{at.tau:.4g}{mark}", f"{at.num_edges:,}", f"{at.mean_degree:.2f}", str(at.num_alone))
    out.print(table)

    table = Table("", "least", "5 %", "median", "95 %", "most", title="sizes")
    for what, values in diagnosis.sizes:
        table.add_row(what, *(_short(value) for value in values))
    out.print(table)

    for finding in diagnosis.findings:
        out.print(f"[{_COLOURS[finding.gravity]}]{finding.gravity}[/] {escape(finding.title)}")
        for line in finding.details:
            out.print(f"    {line}", markup=False)
        out.print(f"  -> {finding.mend}", markup=False)
    out.print(summary_line(diagnosis), markup=False)


def summary_line(diagnosis: Diagnosis) -> str:
    """How many findings of each gravity."""
    counts = {gravity: diagnosis.number(gravity) for gravity in GRAVITIES}
    found = ", ".join(
        f"{number} {gravity}{'' if number == 1 or gravity == 'info' else 's'}"
        for gravity, number in counts.items()
        if number
    )
    return f"findings: {found or 'none'}"


def write_page(path: Path, diagnosis: Diagnosis, max_pixels: int) -> None:
    """Writes the page; thumbnails and pictures are inside it.

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

    def thumbnail(shown: Shown) -> str | None:
        if shown.uri not in thumbnails:
            thumbnails[shown.uri] = _thumbnail(shown.uri, max_pixels)
        return thumbnails[shown.uri]

    picture = io.BytesIO()
    draw_graph(diagnosis.graph, diagnosis.tau, picture)
    page = template.render(
        diagnosis=diagnosis,
        summary=summary_line(diagnosis),
        thumbnail=thumbnail,
        labels=_label_rows(diagnosis),
        per_image=_per_image_rows(diagnosis),
        origin=_origin(diagnosis),
        margin=1 + 0.45 * min(20, max(map(len, diagnosis.label_names))),
        heat_map=_heat_map(diagnosis) if len(diagnosis.label_names) <= _HEAT_MAP else [],
        graph=_data_uri(picture.getvalue(), "png"),
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def _print_labels(out: Console, diagnosis: Diagnosis) -> None:
    table = Table("label", *(one.name for one in diagnosis.splits), "train", title="images with each label")
    rows = _label_rows(diagnosis)
    skipped = len(rows) - _LABEL_ROWS
    for place, row in enumerate(rows):
        if skipped > 0 and place == _LABEL_ROWS // 2:
            table.add_row(f"... {skipped} more", *[""] * (len(diagnosis.splits) + 1))
        if skipped <= 0 or not _LABEL_ROWS // 2 <= place < len(rows) - _LABEL_ROWS // 2:
            bar = "█" * round(_BAR * row["share"]) or ("▏" if row["numbers"][0] else "")
            table.add_row(escape(row["name"]), *(f"{number:,}" for number in row["numbers"]), bar)
    out.print(table)


def _origin(diagnosis: Diagnosis) -> str:
    """What the label graph was counted on."""
    return str(diagnosis.graph.provenance or "a file that does not say on what it was counted")


def _label_rows(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """One row a label, the most frequent in train first: `name`, `numbers` of each split, `unknown` in all, `share` of the largest."""
    train = diagnosis.splits[0].present
    return [
        {
            "name": diagnosis.label_names[index],
            "numbers": [int(one.present[index]) for one in diagnosis.splits],
            "unknown": int(sum(one.unknown[index] for one in diagnosis.splits)),
            "share": float(train[index] / max(1, train.max())),
            "example": diagnosis.examples.get(diagnosis.label_names[index]),
        }
        for index in np.argsort(-train, kind="stable")
    ]


def _per_image_rows(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """One row for each number of labels that an image has: `number`, `counts` of each split, `share` of the largest in train."""
    longest = max(len(one.labels_per_image) for one in diagnosis.splits)
    most = int(diagnosis.splits[0].labels_per_image.max())
    counts = [[_at(one.labels_per_image, number) for one in diagnosis.splits] for number in range(longest)]
    return [{"number": number, "counts": row, "share": row[0] / most} for number, row in enumerate(counts) if any(row)]


def _at(values: Sequence[int] | np.ndarray[Any, Any], index: int) -> int:
    return int(values[index]) if index < len(values) else 0


def _heat_map(diagnosis: Diagnosis) -> list[tuple[int, int, float, str]]:
    """(column, row, P, words) of each pair that occurs together in train; row r, column c show P(c | r)."""
    probability = conditional_probability(diagnosis.counts)
    names = diagnosis.label_names
    return [
        (int(c), int(r), round(float(probability[r, c]), 3), f"P({names[c]} | {names[r]}) = {probability[r, c]:.2f}")
        for r, c in np.argwhere(probability > 0)
    ]


def _thumbnail(uri: str, max_pixels: int) -> str | None:
    """A small JPEG as a data URI; None where the image cannot be shown."""
    try:
        pixels = decode(read_bytes(uri), max_pixels=max_pixels)
    except (UserError, OSError):
        return None  # the page shows its name in place of it
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=80)
    return _data_uri(stream.getvalue(), "jpeg")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _short(value: float) -> str:
    """Three figures, or all of a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
