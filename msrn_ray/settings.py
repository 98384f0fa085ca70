"""The settings of an experiment beside those of the data, with the values that each field allows. Field docstrings are the help text."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Level = Literal["layer1", "layer2", "layer3", "layer4"]
LEVELS: tuple[Level, ...] = ("layer1", "layer2", "layer3", "layer4")
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
# Marks fields that may differ when a run is resumed: they do not change what is trained (epochs may only grow), or only say where a file is
MAY_DIFFER = "may differ"


def _check_tau(value: Any) -> Any:
    """Return tau or raise a single message: pydantic would write one for each type of the union."""
    with suppress(TypeError, ValueError):
        if value == "auto" or 0 < float(value) <= 1:
            return value
    raise ValueError(f"model.tau: must be greater than 0 and at most 1, or auto (got {value!r})")


def _check_interval(value: Any) -> Any:
    if value is None or re.fullmatch(r"0*[1-9]\d* ?steps?|(?=.*[1-9])\d+(\.\d+)? ?minutes?", str(value)):
        return value
    raise ValueError(f'train.checkpoint_every: must be like "200 steps", "10 minutes" or None (got {value!r})')


def _check_workers(value: Any) -> Any:
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(value))
    if match and match[2] is None and int(match[1]) >= 1:
        return int(match[1])
    if match and match[2] is not None and int(match[2]) > int(match[1]) >= 1:
        return value
    raise ValueError(f"resources.num_workers: must be 1 or more, or a range such as 2..8 (got {value!r})")


Tau = Annotated[float | Literal["auto"], BeforeValidator(_check_tau)]
Interval = Annotated[str | None, BeforeValidator(_check_interval)]
Workers = Annotated[int | str | None, BeforeValidator(_check_workers)]


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown fields, field docstrings become the help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelSettings(Settings):
    """Architecture (paper section 3; C labels, G groups, D embedding width)."""

    name: Literal["msrn", "gap", "gmp"] = "msrn"
    """`msrn`, or a baseline: the same backbone, global average (gap) or max (gmp) pooling, one linear layer."""
    backbone: str = "resnet101"
    """ResNet, ResNeXt or Wide-ResNet of torchvision by name, or `resnet10` (one basic block per stage)."""
    pretrained: Annotated[str | None, MAY_DIFFER] = "IMAGENET1K_V1"
    """Backbone weights: name of torchvision weights (downloaded once), a state-dict file, or None for random weights."""
    levels: tuple[Level, ...] = ("layer2", "layer3", "layer4")
    """Backbone stages that semantic attention looks at, fine to coarse."""
    head: Literal["mlp", "elementwise"] = "mlp"
    """`mlp`: the paper's two-layer head (264 M weights on COCO). `elementwise`: one weight vector per label (0.25 M)."""
    embed_dim: Count = 512
    """D, width of label embeddings, group embeddings and projected features."""
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
    """Smallest mean number of other labels that a label attends to, with tau `auto`. The paper's tau of 0.4 gives 0.3 on VOC 2007 and
    1.39 on COCO 2014. The default lies between: one neighbour per label (tau 0.2225 and 0.4566)."""
    frozen_stages: Annotated[int, Field(ge=0, le=5)] = 0
    """How much of the backbone keeps its weights: 0 none, 1 the stem, 2 also layer1, ... 5 also layer4. Small data needs it."""
    frozen_batchnorm: bool = False
    """Keep the backbone's BatchNorm statistics and affine weights unchanged."""
    prior_bias: bool = True
    """Start the last layer's biases at the log-odds of the label frequencies. Off in the paper's recipe."""
    compile: Annotated[Literal["auto", "on", "off"], MAY_DIFFER] = "auto"
    """Kernels of the semantic attention: `on` compiles them (once, then from TORCHINDUCTOR_CACHE_DIR), `off` runs them tile by tile,
    several times slower. `auto` compiles where g++ and Python's headers (CPU) or Triton (GPU) are installed."""

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        if not self.levels:
            raise ValueError(f"model.levels is empty: give at least one of {' '.join(LEVELS)}")
        if len(set(self.levels)) != len(self.levels):
            raise ValueError(f"model.levels names a stage twice: {' '.join(self.levels)}; give each stage once")
        if list(self.levels) != sorted(self.levels):
            raise ValueError(f"model.levels must go from fine to coarse: {' '.join(sorted(self.levels))}")
        return self


class LossSettings(Settings):
    """A classification loss plus the group loss (paper section 3.4). `val/loss` is always the soft margin loss, so that runs compare."""

    name: Literal["soft_margin", "asl"] = "soft_margin"
    """`soft_margin`: the paper's multi-label soft margin. `asl`: the asymmetric loss of arXiv 2009.14119, for many labels of which few are
    present."""
    gamma_positive: Annotated[float, Field(ge=0, le=10)] = 0.0
    """ASL: focusing of present labels, (1 - p)^gamma. 0 as in its paper."""
    gamma_negative: Annotated[float, Field(ge=0, le=10)] = 4.0
    """ASL: focusing of absent labels, p^gamma. A larger value ignores easy labels more. 4 as in its paper."""
    clip: Fraction = 0.05
    """ASL: probability below which an absent label adds no loss. 0.05 as in its paper."""
    group_weight: Annotated[float, Field(ge=0)] = 1e-4
    """Weight of the group loss, sum_i || E_i - Q_argmax(A_i) ||_2."""


class OptimSettings(Settings):
    """Optimizer, learning-rate schedule, gradient handling."""

    name: Literal["sgd", "adamw"] = "sgd"
    """`sgd` with momentum, as in the paper, or `adamw`, which starts to learn sooner on small data."""
    lr: Positive = 0.1
    """Peak learning rate of all parts but the backbone."""
    backbone_lr_factor: Annotated[float, Field(ge=0)] = 0.1
    """Learning rate of the backbone, buffer convolutions included, as a multiple of `lr`."""
    momentum: Fraction = 0.9
    """Momentum of SGD. AdamW does not use it."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """L2 penalty (SGD) or decoupled decay (AdamW), on every parameter."""
    schedule: Literal["step", "cosine", "onecycle", "constant"] = "step"
    """`step`: x `step_factor` at each of `step_epochs`. `cosine`: down to zero. `onecycle`: up over 30 % of the run, then down to zero."""
    step_epochs: tuple[Count, ...] = (30,)
    """Epochs at which `step` lowers the rate."""
    step_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor of one `step`."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0
    """Length of the linear warm-up from zero, epochs. 0: none. Not with `onecycle`, which has its own."""
    clip_norm: Positive | None = 10.0
    """Largest L2 norm of the whole gradient, applied after backward. None: no clipping."""
    accumulation: Count = 1
    """Micro-batches per optimizer step. The result is that of the whole batch, except that BatchNorm sees micro-batches."""
    compress_gradients: bool = False
    """Send gradients between workers as bf16: half the traffic, values rounded to 8 bits. Pays with the `mlp` head on a slow network."""
    ema_decay: Fraction = 0.0
    """Decay of the exponential moving average of the weights that is evaluated and saved. 0: none."""


class TrainSettings(Settings):
    """Length, batch, precision, outputs of a run."""

    epochs: Annotated[Count, MAY_DIFFER] = 40
    """Passes over the train split."""
    batch_size: Count = 16
    """Images per optimizer step over all workers, so that the number of workers does not change the training."""
    eval_batch_size: Annotated[Count, MAY_DIFFER] = 32
    """Images that a worker scores at once."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of weights, image order and augmentation."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision of training. `auto`: bf16 where GPU or CPU (avx512_bf16, amx_bf16) compute in it, else off. Images are scored in
    full precision."""
    storage: Annotated[str, MAY_DIFFER] = "runs"
    """Folder that holds the run folders. On a cluster, a folder that every node sees."""
    run_name: Annotated[str | None, MAY_DIFFER] = None
    """Name of the run folder. None: preset, date and time."""
    log_every: Annotated[Count, MAY_DIFFER] = 20
    """Steps between two progress reports, and between two checks for a non-finite loss."""
    hang_minutes: Annotated[Positive, MAY_DIFFER] = 10.0
    """Minutes without progress (stopped, or waiting for images) after which a worker is named and its process ended. A line warns after
    a fifth of that. Must be longer than building the model, compiling it, one step or saving a checkpoint takes."""
    checkpoint_every: Annotated[Interval, MAY_DIFFER] = "10 minutes"
    """How often to save within an epoch, to resume from there after an interruption: "200 steps" of an epoch, "10 minutes" (checked
    every `log_every` steps), or None. The end of an epoch is always saved."""
    max_failures: Annotated[int, Field(ge=0), MAY_DIFFER] = 3
    """Lost workers (killed, out of memory, a node gone) that a run survives; it resumes from its last checkpoint. Errors that only a user
    can fix stop it at once."""

    @property
    def checkpoint_steps(self) -> int | None:
        """Steps between two checkpoints; None if they are timed."""
        number, counted, _ = (self.checkpoint_every or "").partition("step")
        return int(number) if counted else None

    @property
    def checkpoint_seconds(self) -> float | None:
        """Seconds between two checkpoints; None if they are counted in steps."""
        number, timed, _ = (self.checkpoint_every or "").partition("minute")
        return 60 * float(number) if timed else None


class ResourceSettings(Settings):
    """What the run takes of the Ray cluster."""

    num_workers: Workers = None
    """Data-parallel train workers. None: one per GPU of the cluster; without a GPU, 2 on a machine with 2 cores or more, else 1. A range
    such as 2..8: as many as the cluster has room for, fewer when a node is lost, more when one joins."""
    use_gpu: bool | None = None
    """Give each worker a GPU. None: if the cluster has one."""
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of a GPU that a worker reserves. Below 1, with `num_workers` 1, the trials of a search share GPUs."""
    cpus_per_worker: Count = 1
    """CPUs that a worker reserves, besides those that decode images."""
    wait_minutes: Positive = 20.0
    """Minutes to wait for room for `num_workers`: for nodes that an autoscaling cluster starts, or for one that replaces a lost node."""
    dashboard: bool = False
    """Start Ray's dashboard with a cluster that the run starts on this machine. A cluster that it joins has its own."""

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
        """Fewest and most workers; None if `num_workers` is None."""
        if self.num_workers is None:
            return None
        fewest, _, most = str(self.num_workers).partition("..")
        return int(fewest), int(most or fewest)
