"""The subcommand `predict`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.markup import escape
from rich.table import Column, Table

from ..errors import UserError
from .output import new_console


@dataclass(frozen=True)
class Predict:
    """Label images with a checkpoint."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder, its model.pt, or a run folder."""
    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files, folders, patterns ('photos/*.jpg') or URIs."""
    out: Path | None = None
    """Write all probabilities to this .csv, .json or .parquet file."""
    batch_size: int = 32
    """Images scored at once."""

    def run(self) -> None:
        """Print a table of labels; with `out` also write every probability."""
        from ..inference.predict_files import OUTPUTS, expand_images, predict_images, write_predictions
        from ..inference.predictor import Predictor
        from ..io.files import check_output

        if not self.images:
            raise UserError("no image given; name files, folders, patterns or URIs")
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: must be at least 1")
        if self.out is not None:
            check_output(self.out, OUTPUTS)
        predictor = Predictor.from_checkpoint(self.checkpoint)
        predictions = list(predict_images(predictor, expand_images(self.images), self.batch_size))
        num_empty = 0
        table = Table(Column("image", overflow="fold"), "labels (probability)")
        for prediction in predictions:
            ranked = sorted(
                zip(prediction.probabilities, predictor.thresholds.tolist(), predictor.label_names, strict=False),
                reverse=True,
            )
            present = [f"{name} {value:.2f}" for value, threshold, name in ranked if value >= threshold]
            likeliest = f"none above its threshold; likeliest {ranked[0][2]} {ranked[0][0]:.2f}" if ranked else ""
            labels = ", ".join(present) or likeliest
            num_empty += not present and not prediction.error
            shown = f"skipped: {prediction.error}" if prediction.error else labels
            table.add_row(escape(prediction.uri), escape(shown))  # rich would read [red] in a name as a style
        out = new_console()
        out.print(table)
        if num_empty:
            print(
                f"{num_empty} of {len(predictions)} images have no label above its threshold; train longer, or rank labels by probability"
                " (--out writes all)"
            )
        skipped = sum(bool(prediction.error) for prediction in predictions)
        if skipped:
            print(f"{skipped} of {len(predictions)} images skipped")
        if skipped == len(predictions):
            raise UserError("none of the images could be read")
        if self.out is not None:
            write_predictions(self.out, predictions, predictor.label_names)
            print(f"wrote {self.out}")
