"""Images per second of the data pipeline and of a torch DataLoader, on the same photographs, in turns in one run.

    python -m tests.benchmarks.data_pipeline [--root FOLDER] [--images 1000] [--rounds 3]

raw         one thread reads, decodes and augments; no batches
dataloader  torch's DataLoader over the same functions, one process per core
reference   torch's DataLoader with Pillow's decoding and multi-scale crop, in float32, like the authors' release
files       this package's pipeline from loose files, as a train worker runs it
prepared    this package's pipeline from the Parquet shards of `msrn prepare`

The start-up of the pipeline begins on a running Ray cluster, that of torch in a process with everything imported. The benchmark prints
separately how long the cluster takes to start. The steady rate leaves out the first epoch, and the last, which only consumes what was
decoded ahead.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import ray
import torch
from PIL import Image
from ray.util.placement_group import placement_group
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as classic

from msrn_ray.data_settings import DataSettings
from msrn_ray.datasets.registry import read_published
from msrn_ray.datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from msrn_ray.io.storage import Location
from msrn_ray.ray_cluster.allocation import decode_cpus
from msrn_ray.ray_cluster.connection import connect, usable_cores
from msrn_ray.ray_data.pipeline import decode_rows, limit_ray_data, train_epochs
from msrn_ray.ray_data.prepare import prepare
from msrn_ray.ray_train.object_store import StoreMeter
from msrn_ray.ray_train.worker import BLOCK_ROWS
from msrn_ray.settings import ResourceSettings
from msrn_ray.training.bad_images import BadImages
from msrn_ray.training.sampling import TrainPlan
from msrn_ray.types import SampleTable

FORMS = ("raw", "dataloader", "reference", "files", "prepared")
BATCH, START_EPOCHS, STEADY_EPOCHS = 16, 5, 7
PHOTOS = Path(__file__).resolve().parents[3] / "shared/data/coco_mini"
Epochs = Iterator[Iterable[object]]  # an iterator of batches per epoch


@dataclass
class Times:
    """Seconds of one run.

    Attributes:
        first: from the start to the first batch.
        ends: from the start to the last batch of each epoch.
        wait: waiting for batches after the first one.
        gaps: from each epoch's last batch to the first batch of the next epoch.
    """

    first: float = 0.0
    ends: list[float] = field(default_factory=list)
    wait: float = 0.0
    gaps: list[float] = field(default_factory=list)

    def steady_rate(self, images: int) -> float:
        """Return the images per second of all epochs but the first and the last."""
        return images * (len(self.ends) - 2) / (self.ends[-2] - self.ends[0])


def consume(open_epochs: Callable[[], Epochs], step_seconds: float = 0.0) -> Times:
    """Consume all batches; each takes `step_seconds`."""
    times = Times()
    start = time.perf_counter()
    step_end = start
    for batches in open_epochs():
        epoch_start = step_end
        for index, _ in enumerate(batches):
            arrival = time.perf_counter()
            if index == 0 and times.ends:
                times.gaps.append(arrival - epoch_start)
            if index == 0 and not times.ends:
                times.first = arrival - start
            else:
                times.wait += arrival - step_end
            time.sleep(step_seconds)
            step_end = time.perf_counter()
        times.ends.append(step_end - start)
    return times


class Photos(Dataset[tuple[Tensor, Tensor]]):
    """This package's transforms, one image at a time."""

    def __init__(self, table: SampleTable, settings: DataSettings) -> None:
        self.samples, self.settings, self.epoch = table.table, settings, 0

    def __len__(self) -> int:
        return int(self.samples.num_rows)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        columns = decode_rows(self.samples, np.array([row]), [self.epoch], self.settings, seed=0)
        return torch.from_numpy(columns["image"][0]), torch.from_numpy(columns["target"][0])


class ReferencePhotos(Photos):
    """Decode, crop and resize with Pillow, flip, convert to a float tensor and normalize, all on the CPU."""

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng()
        image = Image.open(self.samples["uri"][row].as_py()).convert("RGB")
        sides = [int(min(image.size) * scale) for scale in self.settings.crop_scales]
        pairs = [(w, h) for i, w in enumerate(sides) for j, h in enumerate(sides) if abs(i - j) <= 2]
        width, height = pairs[rng.integers(len(pairs))]
        left, top = (
            (whole - part) // 4 * int(rng.integers(5)) for whole, part in zip(image.size, (width, height), strict=True)
        )
        crop = image.crop((left, top, left + width, top + height))
        crop = crop.resize((self.settings.image_size,) * 2, Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = classic.normalize(classic.to_tensor(crop), IMAGENET_MEAN, IMAGENET_STD)
        return pixels, torch.tensor(self.samples["target"][row].as_py(), dtype=torch.float32)


def raw(table: SampleTable, settings: DataSettings, epochs: int) -> Epochs:
    """Read image after image in one thread."""
    torch.set_num_threads(1)
    photos = Photos(table, settings)
    for epoch in range(epochs):
        photos.epoch = epoch
        yield (photos[row] for row in range(len(photos)))


def dataloader(photos: Photos, epochs: int) -> Epochs:
    """Iterate over a plain DataLoader."""
    loader = DataLoader(photos, BATCH, shuffle=True, num_workers=usable_cores(), persistent_workers=True)
    for _ in range(epochs):
        yield loader


def pipeline(table: SampleTable, settings: DataSettings, epochs: int) -> Epochs:
    """Return what the only worker of a run iterates over."""
    plan = TrainPlan(len(table), BATCH, 0, 1, seed=0, first_epoch=0, epochs=epochs, block_size=BLOCK_ROWS)
    return train_epochs(ray.put(table.table), plan, settings, BadImages())


def make_photos(root: Path, folder: Path, number: int) -> DataSettings:
    """Make a data set of `number` copies of the photographs of `root`, in turn, with a manifest."""
    photos = sorted(path for path in root.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"})
    if not photos:
        raise SystemExit(f"--root {root}: holds no .jpg; give a folder of photographs")
    lines = ["image,labels,split"]
    for index in range(number):
        shutil.copyfile(photos[index % len(photos)], folder / f"{index:06}.jpg")
        lines.append(f"{index:06}.jpg,{'even' if index % 2 else 'odd'},train")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return DataSettings(dataset="manifest", root=str(folder / "labels.csv"), test_fraction=0.0)


def store_peaks(table: SampleTable, settings: DataSettings) -> None:
    """Print the object store's use in an epoch of 1 and of 4 times the data, with a consumer slower than the decoding."""
    for factor in (1, 4):
        many = table.take(np.tile(np.arange(len(table)), factor))
        with StoreMeter(seconds=0.25) as meter:
            consume(partial(pipeline, many, settings, 1), step_seconds=0.05)
        print(
            f"object store at {factor}x the images ({3e-6 * len(many) * settings.image_size**2:.0f} MB decoded):"
            f" peak {meter.peak_bytes / 1e6:.0f} MB, spilled {meter.spilled_bytes / 1e6:.0f} MB",
            flush=True,
        )


@dataclass
class Measured:
    """The results of one form in all rounds: images per second, and seconds to the first batch."""

    steady: list[float] = field(default_factory=list)
    start_up: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)


def take_turns(forms: dict[str, Callable[[int], Epochs]], images: int, rounds: int) -> None:
    """Print medians of the rates, and their ratios to the DataLoader's."""
    measured = {name: Measured() for name in forms}
    for turn in range(rounds):
        order = list(forms.items())
        for name, form in reversed(order) if turn % 2 else order:  # no form always follows the slowest one
            seen = measured[name]
            if name == "raw":  # has no start-up
                seen.steady.append(consume(partial(form, 3)).steady_rate(images))
                continue
            seen.steady.append(consume(partial(form, STEADY_EPOCHS)).steady_rate(images))
            times = consume(partial(form, START_EPOCHS))
            seen.start_up.append(START_EPOCHS * images / times.ends[-1])
            seen.first.append(times.first)
    print(f"{'':12}{'steady img/s':>14}{'ratio':>7}{'with start-up':>15}{'ratio':>7}{'first batch s':>15}")
    base = measured["dataloader"]
    for name, seen in measured.items():
        steady = statistics.median(seen.steady)
        line = f"{name:12}{steady:14.0f}{steady / statistics.median(base.steady):7.2f}"
        if seen.start_up:
            start_up = statistics.median(seen.start_up)
            line += f"{start_up:15.0f}{start_up / statistics.median(base.start_up):7.2f}{statistics.median(seen.first):15.2f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=PHOTOS, help="folder of photographs (JPEG), inner folders too")
    parser.add_argument(
        "--images", type=int, default=1000, help="images per epoch; the photographs of the folder in turn"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each form")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS, help="the forms to compare")
    parser.add_argument("--step-seconds", type=float, default=0.1, help="seconds per batch of 16 of the slow consumer")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "photos"
        folder.mkdir()
        settings = make_photos(options.root, folder, options.images)
        table = read_published(settings).train
        start = time.perf_counter()
        resources = ResourceSettings(num_workers=1)
        # With Ray's default of 15, other programs of the machine would slow down Ray alone
        os.environ.setdefault("RAY_worker_niceness", "0")
        connect(resources)
        print(f"Ray cluster up in {time.perf_counter() - start:.1f} s", flush=True)
        shards = Location(f"{temporary}/prepared")
        prepare(settings, shards)
        prepared = read_published(settings.model_copy(update={"root": str(shards)})).train
        limit_ray_data(decode_cpus(1, resources.cpus_per_worker))
        ray.get(placement_group([{"CPU": 1}]).ready())  # what a train worker reserves
        all_forms: dict[str, Callable[[int], Epochs]] = {
            "raw": partial(raw, table, settings),
            "dataloader": lambda epochs: dataloader(Photos(table, settings), epochs),
            "reference": lambda epochs: dataloader(ReferencePhotos(table, settings), epochs),
            "files": partial(pipeline, table, settings),
            "prepared": partial(pipeline, prepared, settings),
        }
        take_turns(
            {name: all_forms[name] for name in {"dataloader": 0} | dict.fromkeys(options.forms)},
            len(table),
            options.rounds,
        )
        for name in ("files", "prepared"):
            times = consume(partial(all_forms[name], 4), options.step_seconds)
            waited = times.wait / (times.ends[-1] - times.first)
            print(
                f"{name}, steps of {options.step_seconds:g} s: data wait {waited:.1%}, longest gap between epochs"
                f" {max(times.gaps):.3f} s, first batch {times.first:.2f} s",
                flush=True,
            )
        store_peaks(table, settings)
        ray.shutdown()


if __name__ == "__main__":
    main()
