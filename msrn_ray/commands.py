"""The subcommands of `msrn`: their options as typed dataclasses, and what each one does."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Column, Table

from .config import DataSettings, ExperimentConfig, ResourceSettings, load_config
from .errors import UserError
from .presets import PRESETS

PresetName = Literal[
    "scenes", "voc2007", "coco2014", "nuswide", "apparel", "manifest", "folders", "huggingface", "webdataset"
]
assert set(PRESETS) == set(PresetName.__args__)  # type: ignore[attr-defined]  # the command line's choices are the presets


def new_console() -> Console:
    """Where results go: no colours on names or numbers, no lines broken."""
    return Console(highlight=False, soft_wrap=True)


def _from_here(path: Path) -> Path:
    """The path as one would type it in the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


@dataclass(frozen=True)
class Train:
    """Train on Ray: a preset, changed by options, or a saved config, or an interrupted run."""

    preset: tyro.conf.Positional[PresetName] = "scenes"
    """Experiment to start from; `msrn presets` lists them."""
    config: Path | None = None
    """Start from this saved YAML or JSON instead of a preset (a run folder holds one)."""
    resume: Path | None = None
    """Go on with this run folder from its last checkpoint."""
    or_resume: bool = False
    """Where there is a run of this `--train.run-name` already, go on with it instead of refusing the name: a job that is submitted again
    resumes itself."""
    experiment: Annotated[ExperimentConfig, tyro.conf.arg(name="")] = field(default_factory=ExperimentConfig)
    """The experiment; every option below changes one value of it."""

    def run(self) -> None:
        """Trains, then says where the results are."""
        from .trainer import train

        start = time.monotonic()
        result = train(self.experiment, resume=self.resume is not None or self._is_there())
        out = new_console()
        _print_summary(out, result.metrics)
        chosen = " (chosen on the test split: protocol paper)" if self.experiment.protocol == "paper" else ""
        scores = [
            f"{split} mAP {result.metrics[f'{split}/mAP']:.4f}"
            for split in ("val", "test")
            if f"{split}/mAP" in result.metrics
        ]
        out.print(f"{', '.join(scores)}{chosen} in {time.monotonic() - start:.0f} s", markup=False)
        out.print(f"best checkpoint {_from_here(result.best_checkpoint)}", markup=False)
        out.print(f"curves {_from_here(result.run_folder / 'curves.png')}", markup=False)
        out.print(f"all figures {_from_here(result.run_folder / 'metrics.jsonl')}", markup=False)

    def _is_there(self) -> bool:
        """Whether `or_resume` finds its run."""
        name = self.experiment.train.run_name
        if self.or_resume and name is None:
            raise UserError("--or-resume: name the run with --train.run-name, so that it is found again")
        return self.or_resume and (Path(self.experiment.train.storage).expanduser() / str(name)).exists()


@dataclass(frozen=True)
class Evaluate:
    """Score a checkpoint on a split, every image once."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder, its model.pt, or a run folder (then its best checkpoint)."""
    split: Literal["train", "val", "test"] = "val"
    """Which part of the data set to score."""
    protocol: Literal["honest", "paper"] = "honest"
    """How the data set is split, see `msrn train --help`; the default is the checkpoint's."""
    batch_size: int = 32
    """Images a worker scores at once."""
    out: Path | None = None
    """Write all metrics to this .json file too."""
    data: DataSettings = field(default_factory=DataSettings)
    resources: ResourceSettings = field(default_factory=ResourceSettings)

    def run(self) -> None:
        """Prints the metrics and each label's AP."""
        from .checkpoint import load_checkpoint
        from .evaluation import evaluate_checkpoint
        from .prediction import check_output

        if self.out is not None:
            check_output(self.out, (".json",))
        trained = load_checkpoint(self.checkpoint).config
        config = trained.model_copy(
            update={
                "data": self.data,
                "resources": self.resources,
                "protocol": self.protocol,
                "train": trained.train.model_copy(update={"eval_batch_size": self.batch_size}),
            }
        )
        metrics = evaluate_checkpoint(self.checkpoint, config, self.split)
        out = new_console()
        for line in [*metrics.pop("notes"), *(f"left out: {image}" for image in metrics.pop("bad"))]:
            out.print(line, markup=False)
        table = Table("label", "AP")
        prefix = f"{self.split}/AP/"
        for name, value in metrics.items():
            if name.startswith(prefix):
                table.add_row(name.removeprefix(prefix), "no positive" if math.isnan(value) else f"{value:.4f}")
        out.print(table)
        _print_summary(out, metrics)
        scored = metrics[f"{self.split}/images"]
        out.print(f"{self.split} mAP {metrics[f'{self.split}/mAP']:.6f} over {scored} images", markup=False)
        if self.out is not None:
            write_json(self.out, metrics)


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
        """Prints a table of labels; with `out` also writes every probability."""
        from .prediction import check_output, expand_images, predict_images, write_predictions
        from .predictor import Predictor

        if not self.images:
            raise UserError("no image given; name files, folders, patterns or URIs")
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: must be at least 1")
        if self.out is not None:
            check_output(self.out)
        predictor = Predictor.from_checkpoint(self.checkpoint)
        predictions = list(predict_images(predictor, expand_images(self.images), self.batch_size))
        table = Table(Column("image", overflow="fold"), "labels (probability)")
        for one in predictions:
            ranked = sorted(
                zip(one.probabilities, predictor.thresholds.tolist(), predictor.label_names, strict=False), reverse=True
            )
            present = [f"{name} {value:.2f}" for value, threshold, name in ranked if value >= threshold]
            likeliest = f"none above its threshold; likeliest {ranked[0][2]} {ranked[0][0]:.2f}" if ranked else ""
            table.add_row(one.uri, f"skipped: {one.error}" if one.error else ", ".join(present) or likeliest)
        out = new_console()
        out.print(table)
        skipped = sum(bool(one.error) for one in predictions)
        if skipped:
            out.print(f"{skipped} of {len(predictions)} images skipped")
        if skipped == len(predictions):
            raise UserError("none of the images could be read")
        if self.out is not None:
            write_predictions(self.out, predictions, predictor.label_names)
            out.print(f"wrote {self.out}", markup=False)


@dataclass(frozen=True)
class ImportOfficial:
    """Turn a checkpoint file of the MSRN authors into a checkpoint of this package."""

    file: tyro.conf.Positional[Path]
    """The authors' .pth.tar."""
    preset: PresetName
    """Benchmark it was trained on: gives label names, group ratio and input size."""
    word_vectors: Path
    """GloVe text file or .npz (`names`, `vectors`) with the word vectors it was trained with, 300 wide."""
    graph: Path
    """.npz with `names`, `adj` (co-occurrence counts) and `nums` (label counts)."""
    out: Path
    """Folder of the new checkpoint; must not exist yet."""
    levels: int = 3
    """Backbone stages that it uses, counted from the deepest."""

    def run(self) -> None:
        """Converts, checks that everything fits, and writes."""
        from .importer import import_official

        label_names = import_official(
            self.file, self.preset, word_vectors=self.word_vectors, graph=self.graph, out=self.out, levels=self.levels
        )
        new_console().print(
            f"wrote {self.out}: {len(label_names)} labels; score it with `msrn evaluate {self.out}`", markup=False
        )


@dataclass(frozen=True)
class Presets:
    """List the presets: data set, recipe, expected mAP and the command."""

    def run(self) -> None:
        """Prints the list."""
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


def _print_summary(out: Console, metrics: Mapping[str, Any]) -> None:
    splits = sorted({name.split("/")[0] for name in metrics if "/" in name}, key=("train", "val", "test").index)
    rows = {"at 0.5": "", "top-3": "_top3", "top-3, >= 0.5": "_top3_at_0.5"}
    for split in splits:
        values = {
            name.removeprefix(f"{split}/"): value for name, value in metrics.items() if name.startswith(f"{split}/")
        }
        if "mAP" not in values:
            continue
        table = Table(split, "CP", "CR", "CF1", "OP", "OR", "OF1")
        for row, suffix in rows.items():
            table.add_row(row, *(f"{values[name + suffix]:.4f}" for name in ("CP", "CR", "CF1", "OP", "OR", "OF1")))
        out.print(table)
        out.print(
            f"{split}: mAP {values['mAP']:.4f}, VOC 11-point {values['mAP_voc11']:.4f}, envelope {values['mAP_envelope']:.4f}"
        )


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes plain values.

    Raises:
        UserError: if the file cannot be written.
    """
    from .run_log import to_json

    try:
        path.write_text(to_json(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def starting_config(argv: list[str]) -> ExperimentConfig:
    """The experiment that a command line starts from, before its options: a preset, a saved config, a run, or a checkpoint's config.

    Raises:
        UserError: if the file that it names cannot be read.
    """
    command, rest = argv[0], argv[1:]
    if command == "evaluate":
        from .checkpoint import load_checkpoint

        named = first_positional(rest)
        return PRESETS["scenes"].config if named is None else load_checkpoint(Path(named)).config
    starts = {option: value for option in ("--config", "--resume") if (value := _option(rest, option)) is not None}
    named = first_positional(rest)
    if len(starts) + (named in PRESETS) > 1:
        raise UserError(
            f"give one start only: a preset, --config or --resume, not {', '.join([*filter(None, [named]), *starts])}"
        )
    if "--config" in starts:
        return load_config(Path(starts["--config"])).with_overrides(
            {"train.run_name": None}
        )  # the same experiment, not the same run
    if "--resume" in starts:
        from .resuming import resume_config

        return resume_config(Path(starts["--resume"]))
    return PRESETS[named if named in PRESETS else "scenes"].config


def _option(words: Sequence[str], option: str) -> str | None:
    """The value of `option VALUE` or `option=VALUE`."""
    for word, after in zip(words, [*words[1:], None], strict=False):
        if word == option:
            return after
        if word.startswith(f"{option}="):
            return word.removeprefix(f"{option}=")
    return None


def first_positional(words: Sequence[str]) -> str | None:
    """The first word that is neither an option nor follows one without `=`; after a flag without a value it is not found."""
    for before, word in zip(["", *words], words, strict=False):
        if not word.startswith("-") and ("=" in before or not before.startswith("-")):
            return word
    return None
