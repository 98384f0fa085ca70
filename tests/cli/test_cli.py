"""The console command: help, presets, sources of a run's settings, and errors of a wrong command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import msrn_ray
from msrn_ray.cli import evaluate as evaluate_command
from msrn_ray.cli.app import main
from msrn_ray.cli.parser import starting_config
from msrn_ray.config import ExperimentConfig, load_config
from msrn_ray.data_settings import DataSettings
from msrn_ray.errors import UserError
from msrn_ray.presets import PRESETS
from msrn_ray.runs.checkpoint import load_checkpoint, save_checkpoint
from msrn_ray.settings import ResourceSettings
from tests.tiny import make_coco, make_photo, make_tiny_checkpoint

SUBCOMMANDS = (
    "train",
    "evaluate",
    "predict",
    "prepare",
    "convert",
    "graph",
    "doctor",
    "runs",
    "cluster",
    "presets",
    "import-official",
)


class CommandResult(NamedTuple):
    """Exit code and output of a call of the command."""

    code: int
    out: str
    err: str


ROOT = Path(msrn_ray.__file__).parents[1]
Cli = Callable[..., CommandResult]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Return a function that runs the command in this process, in an empty working directory."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*argv: str | Path) -> CommandResult:
        monkeypatch.setattr(sys, "argv", ["msrn", *map(str, argv)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return CommandResult(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint whose settings for `evaluate` all differ from the defaults."""
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")
    changes = {"protocol": "paper", "train.eval_batch_size": 5, "data.val_fraction": 0.3, "resources.num_workers": 1}
    tiny = load_checkpoint(folder)
    save_checkpoint(folder, replace(tiny, config=tiny.config.with_overrides(changes)))
    return folder


class TrainCall(NamedTuple):
    """The arguments with which the command called `train`."""

    experiment: ExperimentConfig
    resume: bool


def make_metrics(split: str, mean: float) -> dict[str, Any]:
    """Return all metrics of a split that the command prints."""
    suffixes = ("", "_top3", "_top3_at_0.5")
    rows = {f"{name}{suffix}": 0.25 for name in ("CP", "CR", "CF1", "OP", "OR", "OF1") for suffix in suffixes}
    values = {"mAP": mean, "mAP_voc11": 0.7, "mAP_envelope": 0.6, "AP/cat": 0.9, "AP/dog": float("nan")} | rows
    return {f"{split}/{name}": value for name, value in values.items()}


@pytest.fixture
def train_calls(monkeypatch: pytest.MonkeyPatch) -> list[TrainCall]:
    """Replace `train`, and return the list of its calls."""
    from msrn_ray.ray_train import driver

    calls: list[TrainCall] = []

    def record_call(config: ExperimentConfig, *, resume: bool = False) -> driver.TrainResult:
        calls.append(TrainCall(config, resume))
        return driver.TrainResult(Path("runs/x"), Path("runs/x/checkpoint_7"), make_metrics("val", 0.51239))

    monkeypatch.setattr(driver, "train", record_call)
    return calls


def plain_text(text: str) -> str:
    """Return a text without frames and line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def described_options(name: str) -> list[tuple[str, str]]:
    """Return the option as typed and the description of every setting that a subcommand offers."""
    groups = {
        "train": dict(ExperimentConfig.model_fields.items()),
        "evaluate": {
            "data": ExperimentConfig.model_fields["data"],
            "resources": ExperimentConfig.model_fields["resources"],
        },
        "prepare": {"data": ExperimentConfig.model_fields["data"]},
        "convert": {"data": ExperimentConfig.model_fields["data"]},
        "graph": {"data": ExperimentConfig.model_fields["data"]},
        "doctor": {"data": ExperimentConfig.model_fields["data"]},
    }
    options = []
    for group, field in groups.get(name, {}).items():
        inner = getattr(field.annotation, "model_fields", None)
        if inner is None and group != "preset":
            options.append((f"--{group}", str(field.description)))
        for key, setting in (inner or {}).items():
            options.append((f"--{group}.{key.replace('_', '-')}", str(setting.description)))
    return options


SUBCOMMAND_OPTIONS = {
    "train": {
        "--config": "Start from this saved YAML or JSON",
        "--resume": "Resume this run folder",
        "--or-resume": "Resume the run of this `--train.run-name` if it exists",
        "--no-or-resume": "Resume the run of this",
    },
    "evaluate": {
        "PATH": "Checkpoint folder, its model.pt, or a run folder",
        "--split": "Which part of the data set to score.",
        "--protocol": "the default is the checkpoint's",
        "--batch-size": "Images that a worker scores at once.",
        "--out": "Write all metrics to this .json file",
        "--allow-train-images": "Score a split of other data even if the run trained on",
        "--no-allow-train-images": "Score a split of other data even if the run trained on",
    },
    "predict": {
        "PATH": "Checkpoint folder, its model.pt, or a run folder.",
        "STR": "Image files, folders, patterns ('photos/*.jpg') or URIs.",
        "--out": "Write all probabilities to this .csv, .json or .parquet file.",
        "--batch-size": "Images scored at once.",
    },
    "prepare": {
        "webdataset}": "Preset whose data set is read.",
        "--out": "Folder or URI to write to. After an interruption, the same command continues there.",
        "--short-side": "Shrink images with a larger short side to this, in pixels",
        "--rows-per-shard": "Images per shard file",
    },
    "convert": {"webdataset}": "Preset whose data set is read.", "--out": "The CSV file."},
    "graph": {
        "--tau": "Label i attends to label j",
        "--tau-degree": "With tau `auto`: the smallest mean number of other labels",
        "--out": "The picture",
        "--save-counts": "Write the label counts",
        "--protocol": "How the data set is split",
    },
    "doctor": {
        "webdataset}": "Preset whose data set is checked",
        "--out": "Write the report, with thumbnails",
        "--protocol": "How the data set is split",
    },
    "runs": {"PATH": "Folder of the runs"},
    "cluster": {"{check}": "What to do", "PATH": "cluster/gpu.yaml", "--num-workers": "Workers of the preset"},
    "plan": {
        "webdataset}": "Preset to plan.",
        "--gpus": "each has one worker",
        "--gpu-tflops": "Peak of one GPU",
        "--network-gbps": "Slowest link",
        "--memory-gbs": "Memory bandwidth of one GPU",
        "--efficiency": "Fraction of the peak",
        "--decode-rate": "Images that one CPU reads",
        "--batch-size": "Images per step",
        "--images": "Images per epoch",
        "--labels": "the benchmark's",
        "--dollars": "Price of a GPU",
    },
    "presets": {},
    "import-official": {
        "PATH": "The authors' .pth.tar.",
        "--preset": "Benchmark that it was trained on",
        "--word-vectors": "300 wide",
        "--graph": "co-occurrence counts",
        "--out": "must not exist yet",
        "--levels": "from the deepest one",
    },
}


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_describes_every_option(cli: Cli, name: str) -> None:
    done = cli(name, "--help")
    assert done.code == 0
    assert done.err == ""
    text = plain_text(done.out)
    options = described_options(name) + list(SUBCOMMAND_OPTIONS[name].items())
    assert len(options) >= len(SUBCOMMAND_OPTIONS[name])
    undescribed = [option for option, words in options if option not in text or plain_text(words) not in text]
    assert undescribed == []


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_lists_no_other_option(cli: Cli, name: str) -> None:
    listed = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", cli(name, "--help").out))
    known = {"--help"} | {option for option, _ in described_options(name)} | set(SUBCOMMAND_OPTIONS[name])
    if name == "evaluate":
        known |= {"--data.root"}
    unknown = {option for option in listed - known if option.replace(".no-", ".") not in known}
    assert unknown == set()


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_program_help_lists_all_subcommands(cli: Cli, argv: list[str]) -> None:
    done = cli(*argv)
    assert done.code == 0
    assert [name for name in SUBCOMMANDS if name not in done.out] == []
    assert "arXiv 2106.11596" in done.out


def test_module_and_console_command_are_the_same(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(msrn_ray.__file__).parents[1]), "COLUMNS": "100"}

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "msrn_ray", *argv]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    help_result = run("--help")
    assert (help_result.returncode, help_result.stderr) == (0, "")
    assert "usage: msrn " in help_result.stdout
    refused = run("train", "--optim.lr", "-1")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.startswith("msrn: error: optim.lr: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["-m", "msrn_ray", "search"], [str(ROOT / "tuning" / "search.py")]])
def test_files_of_the_working_directory_are_not_imported(tmp_path: Path, command: list[str]) -> None:
    for name in ("numpy", "torch", "datasets", "tyro", "pathlib", "tuning", "msrn_ray"):
        if name != "msrn_ray" or command[0] != "-m":
            (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    refused = subprocess.run(
        [sys.executable, *command, "--optim.lr", "-1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.stderr.startswith("msrn: error: optim.lr: ")


def test_source_checkout_runs_without_pythonpath() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for command in (["-m", "msrn_ray", "search"], ["tuning/search.py"]):
        argv = [sys.executable, *command, "--help"]
        done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert "usage: msrn search " in done.stdout


def test_misspelt_option_names_only_its_own_command(cli: Cli) -> None:
    done = cli("predict", "--data.rot", "x")
    assert done.code == 2
    assert "--data.root" not in done.err
    done = cli("train", "--optim.lrr", "1")
    assert "--optim.lr" in done.err
    assert "evaluate" not in done.err


def test_version_is_printed(cli: Cli) -> None:
    assert re.fullmatch(r"msrn \d+\.\d+\.\d+\n", cli("--version").out)


def test_closed_pipe_ends_the_command_quietly(tmp_path: Path) -> None:
    """As in `msrn presets | head -1`."""
    environment = {**os.environ, "PYTHONPATH": str(Path(msrn_ray.__file__).parents[1])}
    command = [sys.executable, "-m", "msrn_ray", "presets"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_error_comes_after_the_output_in_a_file(tmp_path: Path) -> None:
    """As in `msrn predict ... >log 2>&1`: Python buffers what it prints into a file, but not its errors."""
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    environment = {**os.environ, "PYTHONPATH": str(Path(msrn_ray.__file__).parents[1])}
    environment.pop("PYTHONUNBUFFERED", None)
    command = [sys.executable, "-m", "msrn_ray", "predict", str(make_tiny_checkpoint(tmp_path / "run")), "bad.jpg"]
    with (tmp_path / "log").open("w") as log:
        subprocess.run(command, cwd=tmp_path, env=environment, stdout=log, stderr=log, check=False, timeout=120)
    lines = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert lines[-2:] == ["1 of 1 images skipped", "msrn: error: none of the images could be read"]


def test_presets_lists_all(cli: Cli) -> None:
    done = cli("presets")
    assert (done.code, done.err) == (0, "")
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.about}" in done.out
        root = {"scenes": "", "manifest": " --data.root labels.csv"}.get(name, " --data.root DIR")
        assert f"msrn train {name}{root}\n" in done.out
        assert f"expected  mAP {preset.expected}" in done.out
    assert "resnet101, 448 px, sgd 0.1, batch 16, 40 epochs" in done.out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nonsense"], ["nonsense", "train, search, evaluate, predict"]),
        (["train", "imagenet"], ["imagenet", "scenes", "coco2014"]),
        (["train", "--bogus", "1"], ["--bogus"]),
        (["train", "--optim.lr"], ["--optim.lr", "Missing value"]),
        (["train", "--optim.lr", "fast"], ["--optim.lr", "'fast'"]),
        (["train", "--model.head", "wide"], ["--model.head", "wide", "mlp"]),
        (["train", "--config"], ["--config", "Missing value"]),
        (["evaluate"], ["Missing", "PATH"]),
        (["evaluate", "--split", "dev"], ["dev", "train", "val", "test"]),
        (["predict"], ["Missing", "PATH"]),
        (["prepare"], ["Missing", "--out"]),
        (["prepare", "imagenet", "--out", "o"], ["imagenet", "coco2014", "webdataset"]),
        (["import-official", "x"], ["--preset", "--word-vectors", "--graph", "--out"]),
    ],
)
def test_unparsable_command_line_exits_2(cli: Cli, argv: list[str], words: list[str]) -> None:
    done = cli(*argv)
    assert done.code == 2
    assert done.out == ""
    assert [word for word in words if word not in plain_text(done.err)] == []
    assert "Traceback" not in done.err
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--optim.lr", "-1"], ["optim.lr", "greater than 0", "-1"]),
        (["train", "--data.image-size", "3"], ["data.image_size", "64", "3"]),
        (["train", "voc2007", "--data.root", "x", "--model.levels"], ["model.levels is empty"]),
        (["train", "--optim.warmup-epochs", "1"], ["optim.warmup_epochs", "onecycle"]),
        (
            ["train", "--train.batch-size", "1", "--optim.accumulation", "2"],
            ["optim.accumulation=2", "train.batch_size=1"],
        ),
        (["train", "voc2007"], ["data.root", "voc", "--data.root DIR"]),
        (["train", "coco2014", "--data.root", "nowhere"], ["nowhere", "no such folder", "annotations/"]),
        (["train", "--config", "none.yaml"], ["none.yaml", "No such file"]),
        (["train", "--config=none.yaml"], ["none.yaml", "No such file"]),
        (["train", "--resume", "none"], ["none", "not a run folder", "config.yaml"]),
        (["train", "--resume=."], ["not a run folder", "config.yaml"]),
        (["evaluate", "none"], ["none", "no such file or folder"]),
        (["evaluate", "."], ["model.pt", "best.txt", "run folder"]),
        (["evaluate", "--split", "val", "none"], ["none", "no such file or folder"]),
        (["predict", "none", "a.jpg"], ["none", "no such file or folder"]),
        (["predict", "none"], ["no image given"]),
        (["predict", "CHECKPOINT", "none.jpg"], ["none.jpg", "no such file"]),
        (["predict", "CHECKPOINT", "*.jpg"], ["*.jpg", "no file matches"]),
        (["predict", "CHECKPOINT", "."], ["holds no image", ".jpg"]),
        (["predict", "none", "a.jpg", "--out", "a.txt"], ["--out a.txt", ".csv .json .parquet"]),
        (["predict", "none", "a.jpg", "--out", "nowhere/a.csv"], ["--out nowhere/a.csv", "does not exist"]),
        (["predict", "CHECKPOINT", "PHOTO", "--batch-size", "0"], ["batch", "0"]),
        (["predict", "CHECKPOINT", "PHOTO", "--batch-size", "-1"], ["batch", "-1"]),
        (["evaluate", "CHECKPOINT", "--batch-size", "0"], ["batch", "0"]),
        (["prepare", "voc2007", "--out", "o"], ["data.root", "voc", "--data.root DIR"]),
        (["prepare", "coco2014", "--out", "o", "--short-side", "0"], ["--short-side 0", "at least 1"]),
        (["prepare", "coco2014", "--out", "o", "--rows-per-shard", "0"], ["--rows-per-shard 0", "at least 1"]),
        (["prepare", "--out", "o", "--data.flip", "coco2014"], ["give coco2014 first, before the options"]),
        (["prepare", "coco2014", "--data.root", "COCO", "--out", "COCO"], ["is not empty", "new or empty folder"]),
        (["graph", "voc2007"], ["data.root", "--data.root DIR"]),
        (["graph", "coco2014", "--data.root", "COCO", "--tau", "1.5"], ["model.tau", "1.5", "at most 1", "auto"]),
        (["graph", "coco2014", "--data.root", "COCO", "--tau-degree", "0"], ["model.tau_degree", "greater than 0"]),
        (["graph", "coco2014", "--save-counts", "a.json"], ["--save-counts a.json", ".npz"]),
        (["graph", "coco2014", "--data.label-counts", "none.npz"], ["none.npz", "no such file"]),
        (["train", "--model.tau", "2"], ["model.tau", "at most 1, or auto", "2"]),
        (["doctor", "coco2014"], ["data.root", "--data.root DIR"]),
        (["doctor", "coco2014", "--data.root", "nowhere"], ["nowhere", "no such folder"]),
        (["doctor", "coco2014", "--out", "a.pdf"], ["--out a.pdf", ".html"]),
        (
            ["graph", "coco2014", "--data.root", "COCO", "--out", "nowhere/a.png"],
            ["nowhere/a.png", "cannot be written"],
        ),
        (
            ["import-official", "a.tar", "--preset", "scenes", "--word-vectors", "v", "--graph", "g", "--out", "o"],
            ["--preset scenes", "voc2007"],
        ),
        (
            ["import-official", "a.tar", "--preset", "voc2007", "--word-vectors", "v", "--graph", "g", "--out", "o"],
            ["a.tar", "no such file", ".pth.tar"],
        ),
        (
            ["import-official", "a.tar", "--preset", "voc2007", "--word-vectors", "v", "--graph", "g", "--out", "."],
            ["--out .", "exists already"],
        ),
    ],
)
def test_user_error_is_one_line(cli: Cli, checkpoint: Path, tmp_path: Path, argv: list[str], words: list[str]) -> None:
    places = {"CHECKPOINT": checkpoint, "PHOTO": tmp_path / "photo.png", "COCO": tmp_path / "coco"}
    if "PHOTO" in argv:
        make_photo(places["PHOTO"])
    if "COCO" in argv:
        make_coco(places["COCO"], {"train": [[0], [0, 1], [1], [2]] * 3, "val": [[0]]})
    done = cli(*(places.get(word, word) for word in argv))
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line.startswith("msrn: error: ")
    assert [word for word in words if word not in line] == []
    assert list(Path().iterdir()) == [], "the command writes nothing"
    assert not (tmp_path / "cache" / "msrn_ray").exists()


def test_starting_config_of_presets_and_files(tmp_path: Path, checkpoint: Path) -> None:
    assert starting_config(["train"]) == PRESETS["scenes"].config
    assert starting_config(["train", "--optim.lr", "1"]) == PRESETS["scenes"].config
    for name in PRESETS:
        assert starting_config(["train", name]) == PRESETS[name].config
        for command in ("graph", "prepare", "doctor"):
            assert starting_config([command, name]) == PRESETS[name].config
    saved = PRESETS["voc2007"].config.with_overrides({"optim.lr": 0.02, "train.run_name": "first"})
    for file in ("saved.yaml", "saved.json"):
        path = tmp_path / file
        saved.save(path)
        fresh = saved.with_overrides({"train.run_name": None})
        assert starting_config(["train", "--config", str(path)]) == fresh
        assert starting_config(["train", f"--config={path}"]) == fresh
        assert starting_config(["train", "--optim.lr", "0.5", "--config", str(path)]) == fresh
    assert starting_config(["evaluate", str(checkpoint)]) == load_checkpoint(checkpoint).config
    assert starting_config(["evaluate", str(checkpoint), "--split", "test"]) == load_checkpoint(checkpoint).config
    with pytest.raises(UserError, match="no such file"):
        starting_config(["evaluate", str(tmp_path / "none")])


def test_starting_config_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "moved here" / "again"
    run.mkdir(parents=True)
    saved = PRESETS["voc2007"].config.with_overrides({"train.storage": "/elsewhere", "train.run_name": "first"})
    saved.save(run / "config.yaml")
    for argv in (["train", "--resume", str(run)], ["train", f"--resume={run}"]):
        config = starting_config(argv)
        assert (config.train.storage, config.train.run_name) == (str(run.parent), "again")
        original = {"train.storage": "/elsewhere", "train.run_name": "first"}
        assert config.with_overrides(original) == saved


@pytest.mark.parametrize("name", PRESETS)
def test_preset_trains_unchanged(cli: Cli, train_calls: list[TrainCall], name: str) -> None:
    done = cli("train", name)
    assert (done.code, done.err) == (0, "")
    assert train_calls == [TrainCall(PRESETS[name].config, False)]
    assert "val mAP 0.5124" in done.out
    assert "best checkpoint runs/x/checkpoint_7" in done.out


def test_results_are_relative_to_the_working_directory(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from msrn_ray.ray_train import driver

    monkeypatch.chdir(tmp_path)
    result = driver.TrainResult(tmp_path / "runs" / "a", Path("/elsewhere/checkpoint_7"), make_metrics("val", 0.5))
    monkeypatch.setattr(driver, "train", lambda config, resume: result)
    lines = cli("train").out.splitlines()
    assert "curves runs/a/curves.png" in lines
    assert "best checkpoint /elsewhere/checkpoint_7" in lines


def test_options_change_single_values(cli: Cli, train_calls: list[TrainCall]) -> None:
    argv = ["--optim.lr", "0.02", "--model.levels", "layer3", "layer4", "--data.no-flip", "--optim.clip-norm", "None"]
    assert cli("train", "coco2014", *argv, "--protocol", "paper").code == 0
    changes = {"optim.lr": 0.02, "model.levels": ["layer3", "layer4"], "data.flip": False, "optim.clip_norm": None}
    assert train_calls[0].experiment == PRESETS["coco2014"].config.with_overrides({**changes, "protocol": "paper"})


def test_preset_counts_at_any_position(cli: Cli, train_calls: list[TrainCall]) -> None:
    """The command may also be refused, but it must not run another preset."""
    done = cli("train", "--optim.lr", "0.02", "voc2007")
    if done.code == 0:
        assert train_calls[0].experiment == PRESETS["voc2007"].config.with_overrides({"optim.lr": 0.02})
    else:
        assert done.code == 2
        assert "voc2007" in done.err
        assert train_calls == []


def test_saved_config_is_the_same_experiment(cli: Cli, train_calls: list[TrainCall], tmp_path: Path) -> None:
    saved = PRESETS["nuswide"].config.with_overrides(
        {"optim.lr": 0.02, "model.levels": ["layer4"], "data.root": "/data/nus", "resources.use_gpu": False}
    )
    saved.save(tmp_path / "saved.yaml")
    assert cli("train", "--config", tmp_path / "saved.yaml").code == 0
    assert cli("train", f"--config={tmp_path / 'saved.yaml'}", "--optim.momentum", "0.8").code == 0
    assert cli("train", "--model.tau", "0.3", "--config", tmp_path / "saved.yaml").code == 0
    assert [call.experiment for call in train_calls] == [
        saved,
        saved.with_overrides({"optim.momentum": 0.8}),
        saved.with_overrides({"model.tau": 0.3}),
    ]
    assert not any(call.resume for call in train_calls)
    assert load_config(tmp_path / "saved.yaml") == saved


def test_resume_uses_the_runs_config(cli: Cli, train_calls: list[TrainCall], tmp_path: Path) -> None:
    run = tmp_path / "store" / "run"
    run.mkdir(parents=True)
    saved = PRESETS["voc2007"].config.with_overrides({"train.storage": str(run.parent), "train.run_name": "run"})
    saved.save(run / "config.yaml")
    assert cli("train", "--resume", run).code == 0
    assert cli("train", "--resume", run, "--train.epochs", "50").code == 0
    longer = saved.with_overrides({"train.epochs": 50})
    assert train_calls == [TrainCall(saved, True), TrainCall(longer, True)]


def test_or_resume_resumes_only_an_existing_run(cli: Cli, train_calls: list[TrainCall], tmp_path: Path) -> None:
    job = ("train", "voc2007", "--or-resume", "--train.storage", tmp_path / "store")
    done = cli(*job)
    assert done.code == 2
    assert "--or-resume: name the run with --train.run-name" in done.err
    assert cli(*job, "--train.run-name", "run").code == 0
    (tmp_path / "store/run").mkdir(parents=True)
    assert cli(*job, "--train.run-name", "run").code == 0
    assert cli(*job, "--train.run-name", "other").code == 0
    assert [call.resume for call in train_calls] == [False, True, False]


def test_runs_are_listed(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "store/a-run").mkdir(parents=True)
    ExperimentConfig().save(tmp_path / "store/a-run/config.yaml")
    done = cli("runs", tmp_path / "store")
    assert (done.code, done.err) == (0, "")
    assert [line.split()[:3] for line in done.out.splitlines()] == [
        ["run", "state", "epoch"],
        ["a-run", "unknown", "0/40"],
    ]
    assert "runs: no such folder; give the train.storage" in cli("runs").err


@pytest.fixture
def evaluate_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, ExperimentConfig, str]]:
    """Replace `evaluate_checkpoint`, and return the list of its calls."""
    from msrn_ray.ray_train import evaluate

    calls = []

    def record_call(path: Path, config: ExperimentConfig, split: str, **options: Any) -> evaluate.Evaluation:
        calls.append((path, config, split))
        metrics = make_metrics(split, 0.75) | {f"{split}/images": 7}
        if options["allow_train_images"]:
            metrics[f"{split}/images_trained_on"] = 2
        return evaluate.Evaluation(metrics, "honest", ("a note",), ("x (cut off)",))

    monkeypatch.setattr(evaluate, "evaluate_checkpoint", record_call)
    return calls


def test_evaluate_starts_from_the_checkpoint(
    cli: Cli, evaluate_calls: list[tuple[Path, ExperimentConfig, str]], checkpoint: Path
) -> None:
    done = cli("evaluate", checkpoint)
    assert (done.code, done.err) == (0, "")
    assert evaluate_calls == [(checkpoint, load_checkpoint(checkpoint).config, "val")]
    assert "val mAP 0.750000 over 7 images" in done.out
    assert "left out: x (cut off)" in done.out
    assert re.search(r"dog\W+n/a", done.out)
    assert "val: mAP leaves out 1 of " in done.out
    assert re.search(r"cat\W+0\.9000", done.out)

    argv = ["--split", "test", "--batch-size", "3", "--protocol", "honest", "--data.root", "/r"]
    assert cli("evaluate", checkpoint, *argv, "--resources.num-workers", "2").code == 0
    path, config, split = evaluate_calls[1]
    changes = {"train.eval_batch_size": 3, "protocol": "honest", "data.root": "/r", "resources.num_workers": 2}
    assert (path, split) == (checkpoint, "test")
    assert config == load_checkpoint(checkpoint).config.with_overrides(changes)


def test_evaluate_finds_its_checkpoint_at_any_position(
    cli: Cli, evaluate_calls: list[tuple[Path, ExperimentConfig, str]], checkpoint: Path
) -> None:
    """The command may also be refused, but it must not use another image size than the checkpoint's."""
    done = cli("evaluate", "--split", "train", checkpoint)
    if done.code == 0:
        assert evaluate_calls == [(checkpoint, load_checkpoint(checkpoint).config, "train")]
    else:
        assert done.code == 2
        assert evaluate_calls == []


def test_evaluate_counts_scored_train_images(
    cli: Cli, evaluate_calls: list[tuple[Path, ExperimentConfig, str]], checkpoint: Path
) -> None:
    assert "over 7 images\n" in cli("evaluate", checkpoint).out
    assert "over 7 images, 2 of which the run trained on" in cli("evaluate", checkpoint, "--allow-train-images").out


def test_evaluate_writes_json_with_null_for_nan(
    cli: Cli, evaluate_calls: list[tuple[Path, ExperimentConfig, str]], checkpoint: Path, tmp_path: Path
) -> None:
    assert cli("evaluate", checkpoint, "--out", tmp_path / "m.json").code == 0
    text = (tmp_path / "m.json").read_text()
    content = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert content["val/mAP"] == 0.75
    assert content["val/AP/dog"] is None
    assert "bad" not in content


@pytest.mark.parametrize("out", ["nowhere/m.json", "m.csv"])
def test_evaluate_refuses_bad_out_before_scoring(
    cli: Cli, evaluate_calls: list[tuple[Path, ExperimentConfig, str]], checkpoint: Path, out: str
) -> None:
    done = cli("evaluate", checkpoint, "--out", out)
    assert done.code == 2
    assert out in done.err
    assert evaluate_calls == []


def test_graph_reports_and_draws(cli: Cli, tmp_path: Path) -> None:
    rows = [[0, 1], [0, 1], [0], [0], [0], [0, 2]] * 5
    make_coco(tmp_path / "coco", {"train": rows, "val": [[0]]})
    argv = ["graph", "coco2014", "--data.root", tmp_path / "coco", "--protocol", "paper"]
    done = cli(*argv)
    assert (done.code, done.err) == (0, "")
    assert "3 labels, 2 edges at tau 0.4" in done.out
    assert "apple <- bench  P(apple | bench) = 1.000  (10 of 10)" in done.out
    assert Path("label_graph.png").read_bytes().startswith(b"\x89PNG")
    assert cli(*argv, "--tau", "0.3", "--out", "b.png").out.count(" <- ") == 3 + 1  # another edge, and the legend
    assert Path("b.png").exists()


def test_graph_with_tau_auto_and_saved_counts(cli: Cli, tmp_path: Path) -> None:
    rows = [[0, 1], [0, 1], [0], [0], [0], [0, 2]] * 5
    make_coco(tmp_path / "coco", {"train": rows, "val": [[0]]})
    argv = ["graph", "coco2014", "--data.root", tmp_path / "coco", "--protocol", "paper"]
    done = cli(*argv, "--tau", "auto", "--save-counts", "counts.npz")
    assert (done.code, done.err) == (0, "")
    assert "counted on 30 images of instances_train2014.json (fingerprint " in done.out
    assert "tau auto: 0.3333 for a mean degree of 1 or more" in done.out
    assert "3 labels, 3 edges at tau 0.3333" in done.out
    assert "counts counts.npz" in done.out
    recounted = cli("graph", "coco2014", "--data.label-counts", "counts.npz", "--out", "again.png")
    assert (recounted.code, recounted.err) == (0, "")
    assert "counted on 30 images of instances_train2014.json (fingerprint " in recounted.out
    assert "3 labels, 2 edges at tau 0.4" in recounted.out
    assert Path("again.png").read_bytes().startswith(b"\x89PNG")
    sparse = cli("graph", "coco2014", "--data.label-counts", "counts.npz", "--tau", "auto", "--tau-degree", "0.3")
    assert "3 labels, 2 edges at tau 1 " in sparse.out


def test_ctrl_c_exits_130_bugs_keep_tracebacks(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_command_raise(error: BaseException) -> None:
        def run(self: evaluate_command.Presets) -> None:
            raise error

        monkeypatch.setattr(evaluate_command.Presets, "run", run)

    make_command_raise(KeyboardInterrupt())
    done = cli("presets")
    assert (done.code, done.out, done.err) == (130, "", "msrn: stopped\n")
    make_command_raise(UserError("first line\n  second line"))
    assert cli("presets") == (2, "", "msrn: error: first line second line\n")
    for bug in (RuntimeError("ours"), ValueError("ours"), KeyError("ours"), AssertionError("ours")):
        make_command_raise(bug)
        with pytest.raises(type(bug), match="ours"):
            cli("presets")


def test_evaluate_settings_share_the_config_defaults() -> None:
    """`evaluate` takes its defaults from the checkpoint, never from the subcommand."""
    assert DataSettings() == ExperimentConfig().data
    assert ResourceSettings() == ExperimentConfig().resources


def test_two_starting_points_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "saved.yaml"
    PRESETS["voc2007"].config.save(path)
    with pytest.raises(UserError, match=r"give one start only.*voc2007, --config"):
        starting_config(["train", "voc2007", "--config", str(path)])
    with pytest.raises(UserError, match=r"give one start only.*--config, --resume"):
        starting_config(["train", "--config", str(path), f"--resume={tmp_path}"])
