"""The subcommands that read and write data sets: `prepare`, `convert`, `graph` and `doctor`."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from ..config import ExperimentConfig
from ..data_settings import DataSettings
from ..errors import UserError
from ..presets import PRESETS, PresetName
from .output import new_console, train_command
from .parser import StartsFromConfig


@dataclass(frozen=True)
class Prepare(StartsFromConfig):
    """Write a data set as Parquet shards that hold the images; `msrn train` reads them from any storage."""

    preset: tyro.conf.Positional[PresetName]
    """Preset whose data set is read."""
    out: str
    """Folder or URI to write to. After an interruption, the same command continues there."""
    short_side: int | None = None
    """Shrink images with a larger short side to this, in pixels, and store them as JPEG. None: keep all bytes."""
    rows_per_shard: int = 256
    """Images per shard file; a task holds that many in memory."""
    data: DataSettings = field(default_factory=DataSettings)

    default_start: ClassVar[str] = ""

    @classmethod
    def from_config(cls, config: ExperimentConfig, argv: Sequence[str]) -> Prepare:
        """See `StartsFromConfig`."""
        return cls(tyro.MISSING, tyro.MISSING, data=config.data)

    def run(self) -> None:
        """Write the shards, then print what they hold and how to train on them."""
        from ..doctor.finding import plural
        from ..io.storage import Location
        from ..ray_data.prepare import prepare

        for option, value in (("--short-side", self.short_side), ("--rows-per-shard", self.rows_per_shard)):
            if value is not None and value < 1:
                raise UserError(f"{option} {value}: must be at least 1")
        start = time.monotonic()
        place = Location.of(self.out)
        info = prepare(
            self.data, place, short_side=self.short_side, rows_per_shard=self.rows_per_shard, console=new_console()
        )
        for name, split in info.splits.items():
            for line in split.notes:
                print(line)
            left_out = f", {split.bad_images} left out (bad_images.csv)" if split.bad_images else ""
            size = f"{sum(split.shard_bytes) / 1e6:.1f} MB in {plural(len(split.shard_bytes), 'shard')}"
            print(f"{name}: {split.images} images{left_out}, {size}")
        print(f"{len(info.label_names)} labels, content {info.content[:12]}, {time.monotonic() - start:.0f} s")
        print(f"train on it with: msrn train {self.preset} --data.root {shlex.quote(str(place))}")


@dataclass(frozen=True)
class Convert(StartsFromConfig):
    """Write the labels of a data set as a manifest of your own: a CSV file with an image per row."""

    preset: tyro.conf.Positional[PresetName]
    """Preset whose data set is read."""
    out: Path
    """The CSV file. A list of the labels in their order is written beside it."""
    data: DataSettings = field(default_factory=DataSettings)

    default_start: ClassVar[str] = ""

    @classmethod
    def from_config(cls, config: ExperimentConfig, argv: Sequence[str]) -> Convert:
        """See `StartsFromConfig`."""
        return cls(tyro.MISSING, tyro.MISSING, config.data)

    def run(self) -> None:
        """Write the manifest, then print what it holds and how to train on it."""
        from ..datasets.manifest_writer import write_manifest
        from ..datasets.registry import read_published
        from ..io.files import check_output, write_text
        from ..io.storage import Location

        check_output(self.out, (".csv",))
        # all images and the splits that the data set names; none is drawn
        everything = {"test_fraction": 0.0, "keep_unlabelled_train": True, "keep_unlabelled_eval": True}
        published = read_published(self.data.model_copy(update=everything))
        tables = published.tables
        for table in tables.values():
            for line in table.notes:
                print(line)
        out, names = self.out.absolute(), self.out.absolute().with_suffix(".labels.txt")
        write_manifest(tables, Location.of(out))
        write_text(names, "\n".join([*published.train.label_names, ""]))
        print(f"{', '.join(f'{name}: {len(table)} images' for name, table in tables.items())}")
        print(
            f"train on it with: msrn train manifest --data.root {shlex.quote(str(out))} --data.labels {shlex.quote(str(names))}"
        )


@dataclass(frozen=True)
class Graph(StartsFromConfig):
    """Show the label graph of a data set: edges at tau, labels without one, a picture."""

    preset: tyro.conf.Positional[PresetName] = "scenes"
    """Preset whose data set is read. With `--data.label-counts` the command shows that file and reads no data set."""
    tau: float | Literal["auto"] = 0.4
    """Label i attends to label j where P(i | j) >= tau in the train split; `auto`: the largest tau that keeps `--tau-degree`."""
    tau_degree: float = 1.0
    """With tau `auto`: the smallest mean number of other labels that a label attends to."""
    out: Path = Path("label_graph.png")
    """The picture, a PNG."""
    save_counts: Path | None = None
    """Write the label counts and their source to this .npz file; `--data.label-counts FILE` uses them."""
    protocol: Literal["honest", "paper"] = "honest"
    """How the data set is split; the graph is counted on train."""
    data: DataSettings = field(default_factory=DataSettings)

    @classmethod
    def from_config(cls, config: ExperimentConfig, argv: Sequence[str]) -> Graph:
        """See `StartsFromConfig`."""
        model = config.model
        return cls(tau=model.tau, tau_degree=model.tau_degree, protocol=config.protocol, data=config.data)

    def run(self) -> None:
        """Print the graph and draw it."""
        from ..datasets.protocol import load_splits
        from ..io.files import check_output
        from ..labels.graph import choose_tau, load_counts, save_counts
        from ..labels.graph_plot import describe_graph, draw_graph
        from ..training.inputs import label_counts

        if self.save_counts is not None:
            check_output(self.save_counts, (".npz",), option="--save-counts")
        config = PRESETS[self.preset].config.model_copy(update={"data": self.data, "protocol": self.protocol})
        graph = config.with_overrides({"model.tau": self.tau, "model.tau_degree": self.tau_degree}).model
        if self.data.label_counts is not None:
            counts = load_counts(Path(self.data.label_counts).expanduser())
        else:
            splits = load_splits(config)
            counts = label_counts(splits.train, None)
            for line in splits.notes:
                print(line)
        if counts.provenance is not None:
            print(f"counted on {counts.provenance}")
        tau = choose_tau(counts, graph.tau, graph.tau_degree)
        if graph.tau == "auto":
            print(f"tau auto: {tau:.4g} for a mean degree of {graph.tau_degree:g} or more")
        for line in describe_graph(counts, tau):
            print(line)
        if self.save_counts is not None:
            save_counts(self.save_counts, counts)
            print(f"counts {self.save_counts}")
        draw_graph(counts, tau, self.out)
        print(f"picture {self.out}")


@dataclass(frozen=True)
class Doctor(StartsFromConfig):
    """Check a data set: labels, duplicates, unreadable images, sizes, label graph, and how to fix each finding."""

    preset: tyro.conf.Positional[PresetName] = "scenes"
    """Preset whose data set is checked."""
    out: Path | None = None
    """Write the report, with thumbnails, to this .html file too."""
    protocol: Literal["honest", "paper"] = "honest"
    """How the data set is split; the same image in two splits is an error."""
    data: DataSettings = field(default_factory=DataSettings)

    @classmethod
    def from_config(cls, config: ExperimentConfig, argv: Sequence[str]) -> Doctor:
        """See `StartsFromConfig`."""
        return cls(protocol=config.protocol, data=config.data)

    def run(self) -> None:
        """Print the report; exit with 1 if a finding is an error."""
        from ..doctor.report import print_diagnosis, write_page
        from ..io.files import check_output
        from ..ray_data.inspect_images import diagnose_data

        if self.out is not None:
            check_output(self.out, (".html",))
        config = PRESETS[self.preset].config.model_copy(update={"data": self.data, "protocol": self.protocol})
        diagnosis = diagnose_data(config)
        print_diagnosis(new_console(), diagnosis)
        if self.out is not None:
            write_page(self.out, diagnosis, self.data.max_pixels)
            print(f"page {self.out}")
        if diagnosis.num_findings("error"):
            raise SystemExit(1)
        print(f"train on it with: {train_command(self.preset, self.data)}")
