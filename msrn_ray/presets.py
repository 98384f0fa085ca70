"""Whole experiments by name.

`scenes` needs no data; four presets are for custom images. The four benchmarks follow the paper's recipe (arXiv 2106.11596 and the
authors' released settings): ResNet-101 pre-trained on ImageNet, 448 pixels, SGD 0.1 / 0.01 with a step at epoch 30, batch 16, the `mlp`
head, layer2 to layer4. Gradients are clipped at norm 10 after backward. The release clips them before backward, so never.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from .config import ExperimentConfig
from .data_settings import Dataset, DataSettings
from .settings import ModelSettings, OptimSettings, TrainSettings


class Preset(NamedTuple):
    """A config, what it is, the mAP to expect with its source, and how many labels and train images the data have, where that is known.

    The train images are those published. Only scenes has a val split beside them; the protocol takes val from them for the others.
    """

    config: ExperimentConfig
    about: str
    expected: str
    num_labels: int | None = None
    num_train: int | None = None


def _benchmark(name: str, dataset: Dataset, group_ratio: float) -> ExperimentConfig:
    return ExperimentConfig(
        preset=name,
        data=DataSettings(dataset=dataset),
        model=ModelSettings(group_ratio=group_ratio, prior_bias=False),
    )


def _custom_images(dataset: Dataset) -> ExperimentConfig:
    """Return a recipe for a few hundred to a few hundred thousand images, on one GPU or (slowly) on a CPU."""
    return ExperimentConfig(
        preset=dataset,
        data=DataSettings(
            dataset=dataset,
            image_size=224,
            missing_words="random",  # custom labels may not be in GloVe
            keep_unlabelled_train=True,  # images without a label are negative examples of every label
        ),
        model=ModelSettings(backbone="resnet50", head="elementwise", group_ratio=0.2),
        optim=OptimSettings(name="adamw", lr=2e-4, weight_decay=1e-2, schedule="onecycle"),
        train=TrainSettings(epochs=20, batch_size=32, eval_batch_size=64),
    )


_SCENES = ExperimentConfig(
    preset="scenes",
    # no crop: it would cut labelled objects out of small scenes
    data=DataSettings(dataset="scenes", image_size=96, crop_scales=()),
    model=ModelSettings(backbone="resnet10", pretrained=None, head="elementwise", embed_dim=128, group_ratio=0.2),
    # a backbone from scratch needs a higher rate than the semantics that attend to it
    optim=OptimSettings(name="adamw", lr=5e-4, backbone_lr_factor=4.0, weight_decay=1e-2, schedule="onecycle"),
    train=TrainSettings(epochs=6, batch_size=16, eval_batch_size=50),
)

_CUSTOM: dict[Dataset, str] = {
    "manifest": "your own images, listed with their labels in a CSV, TSV, JSON Lines or Parquet file",
    "folders": "your own images in a folder for each label, with or without train/, val/, test/ around them",
    "huggingface": "a Hugging Face data set: what `save_to_disk` wrote, or Parquet files with the images inside",
    "webdataset": "WebDataset tars with an image and its labels (.json or .cls) side by side",
}
# the only list of presets: the choices of the command line are derived from it
PRESETS: dict[str, Preset] = {
    "scenes": Preset(
        _SCENES,
        "generated scenes of 2,000 + 500 + 500 images, a small network from scratch; minutes on a laptop",
        "0.90 or more on val",
        num_labels=16,
        num_train=2_000,
    ),
    "voc2007": Preset(
        _benchmark("voc2007", "voc", 0.2),
        "PASCAL VOC 2007, 20 classes, trainval 5,011 + test 4,952 images",
        "96.0 when pre-trained on COCO (paper, table 3)",
        num_labels=20,
        num_train=5_011,
    ),
    "coco2014": Preset(
        _benchmark("coco2014", "coco", 0.05),
        "MS-COCO 2014, 80 classes, train 82,783 + val 40,504 images",
        "83.4 (paper, table 1)",
        num_labels=80,
        num_train=82_081,
    ),
    "nuswide": Preset(
        _benchmark("nuswide", "nuswide", 0.05),
        "NUS-WIDE, 81 concepts, official train and test lists",
        "61.5 on the csv variant of the lists (paper, table 2)",
        num_labels=81,
        num_train=161_789,
    ),
    "apparel": Preset(
        _benchmark("apparel", "apparel", 0.2),
        "Apparel, 6 colours + 5 garments in <colour>_<garment>/ folders, split by seed",
        "none published on this split",
    ),
    **{name: Preset(_custom_images(name), about, "depends on the data") for name, about in _CUSTOM.items()},
}

if TYPE_CHECKING:
    PresetName = str
else:
    PresetName = Literal[tuple(PRESETS)]
