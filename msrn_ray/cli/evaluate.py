"""The subcommands `evaluate`, `import-official` and `presets`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import tyro
from rich.table import Table

from ..config import ExperimentConfig
from ..data_settings import DataSettings
from ..presets import PRESETS, PresetName
from ..settings import ResourceSettings
from .output import new_console, print_summary
from .parser import StartsFromConfig


@dataclass(frozen=True)
class Evaluate(StartsFromConfig):
    """Score a checkpoint on a split as its run recorded it, every image once."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder, its model.pt, or a run folder (then its best checkpoint)."""
    split: Literal["train", "val", "test"] = "val"
    """Which part of the data set to score."""
    protocol: Literal["honest", "paper"] = "honest"
    """How the data set is split, see `msrn train --help`; the default is the checkpoint's."""
    batch_size: int = 32
    """Images that a worker scores at once."""
    out: Path | None = None
    """Write all metrics to this .json file too."""
    allow_train_images: bool = False
    """Score a split of other data even if the run trained on some of its images. The output counts them."""
    data: DataSettings = field(default_factory=DataSettings)
    resources: ResourceSettings = field(default_factory=ResourceSettings)

    default_start: ClassVar[str] = ""

    @classmethod
    def from_config(cls, config: ExperimentConfig, argv: Sequence[str]) -> Evaluate:
        """See `StartsFromConfig`; the config is the checkpoint's."""
        return cls(
            tyro.MISSING,
            protocol=config.protocol,
            batch_size=config.train.eval_batch_size,
            data=config.data,
            resources=config.resources,
        )

    @property
    def start(self) -> str:
        """The checkpoint."""
        return str(self.checkpoint)

    def run(self) -> None:
        """Print the metrics and each label's AP."""
        from ..io.files import check_output, write_output
        from ..ray_train.evaluate import evaluate_checkpoint
        from ..runs.checkpoint import load_checkpoint
        from ..runs.history import to_json

        if self.out is not None:
            check_output(self.out, (".json",))
        checkpoint = load_checkpoint(self.checkpoint)
        changes = {"protocol": self.protocol, "train.eval_batch_size": self.batch_size}
        config = checkpoint.config.with_overrides(changes)
        config = config.model_copy(update={"data": self.data, "resources": self.resources})
        evaluation = evaluate_checkpoint(
            self.checkpoint, config, self.split, allow_train_images=self.allow_train_images, checkpoint=checkpoint
        )
        metrics = evaluation.metrics
        out = new_console()
        for line in [*evaluation.notes, *(f"left out: {image}" for image in evaluation.bad)]:
            print(line)
        table = Table("label", "AP")
        prefix = f"{self.split}/AP/"
        precisions = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
        for name, value in precisions.items():
            table.add_row(name, "n/a" if math.isnan(value) else f"{value:.4f}")
        out.print(table)
        print_summary(out, metrics)
        num_left_out = sum(map(math.isnan, precisions.values()))
        if num_left_out:
            print(
                f"{self.split}: mAP leaves out {num_left_out} of {len(precisions)} labels (n/a): no image has them, or every image"
                " where they are known"
            )
        num_trained = metrics.get(f"{self.split}/images_trained_on", 0)
        trained_on = f", {num_trained} of which the run trained on" if num_trained else ""
        scored = metrics[f"{self.split}/images"]
        print(f"{self.split} mAP {metrics[f'{self.split}/mAP']:.6f} over {scored} images{trained_on}")
        if self.out is not None:
            with write_output(self.out) as partial:
                content = to_json(metrics | {"protocol": evaluation.protocol}, indent=2)
                partial.write_text(content + "\n", encoding="utf-8")


@dataclass(frozen=True)
class ImportOfficial:
    """Turn a checkpoint file of the MSRN authors into a checkpoint of this package."""

    file: tyro.conf.Positional[Path]
    """The authors' .pth.tar."""
    preset: PresetName
    """Benchmark that it was trained on. It fixes label names, group ratio and input size."""
    word_vectors: Path
    """GloVe text file or .npz (`names`, `vectors`) with its training's word vectors, 300 wide."""
    graph: Path
    """.npz with `names`, `adj` (co-occurrence counts) and `nums` (label counts)."""
    out: Path
    """Folder of the new checkpoint; must not exist yet."""
    levels: int = 3
    """Number of backbone stages that it uses, from the deepest one."""

    def run(self) -> None:
        """Convert the file, check that everything fits, and write the checkpoint."""
        from ..official import import_official

        label_names = import_official(
            self.file, self.preset, word_vectors=self.word_vectors, graph=self.graph, out=self.out, levels=self.levels
        )
        print(f"wrote {self.out}: {len(label_names)} labels; score it with `msrn evaluate {self.out}`")


@dataclass(frozen=True)
class Presets:
    """List the presets: data set, recipe, expected mAP and the command."""

    def run(self) -> None:
        """Print the list."""
        for name, preset in PRESETS.items():
            config = preset.config
            root = {"scenes": "", "manifest": " --data.root labels.csv"}.get(name, " --data.root DIR")
            print(f"{name}: {preset.about}")
            print(
                f"    recipe    {config.model.backbone}, {config.data.image_size} px, {config.optim.name} {config.optim.lr:g},"
                f" batch {config.train.batch_size}, {config.train.epochs} epochs"
            )
            print(f"    expected  mAP {preset.expected}")
            print(f"    command   msrn train {name}{root}\n")
