"""`msrn import-official`: an authors' file becomes a checkpoint that scores like the authors' release."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msrn_ray.cli.app import main
from msrn_ray.datasets.apparel import APPAREL_LABELS
from msrn_ray.datasets.voc import VOC_LABELS
from msrn_ray.errors import UserError
from msrn_ray.inference.predictor import Predictor
from msrn_ray.official import import_official
from tests.golden import golden_images, load_golden, official_shapes, official_state_dict


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, np.ndarray]:
    return load_golden(shared)


@pytest.fixture(scope="module")
def file(golden: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a file as the authors' training writes it on several GPUs."""
    path = tmp_path_factory.mktemp("official") / "voc_checkpoint.pth.tar"
    state = {f"module.{name}": tensor for name, tensor in official_state_dict(int(golden["salt"])).items()}
    torch.save({"epoch": 12, "arch": "resnet101", "state_dict": state, "best_score": torch.tensor(96.04)}, path)
    yield path
    path.unlink()  # half a GB


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with the right names and shapes, in which every tensor repeats a number: 1 MB on disk."""
    path = tmp_path_factory.mktemp("blank") / "voc_checkpoint.pth.tar"
    save(path, blank_state())
    return path


def blank_state() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(()).expand(shape) for name, shape in official_shapes().items()}


def save(path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save({"epoch": 12, "arch": "resnet101", "state_dict": state, "best_score": 96.04}, path)


@pytest.fixture
def sources(shared: Path) -> dict[str, Path]:
    folder = shared / "word_vectors"
    return {"word_vectors": folder / "voc.npz", "graph": folder / "cooccurrence_voc.npz"}


def test_imported_model_scores_like_the_release(
    file: Path,
    sources: dict[str, Path],
    golden: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "imported"
    argv = ["import-official", file, "--preset", "voc2007", "--out", out]
    options = ["--word-vectors", sources["word_vectors"], "--graph", sources["graph"]]
    monkeypatch.setattr(sys, "argv", ["msrn", *map(str, argv + options)])
    main()
    assert f"wrote {out}: 20 labels; score it with `msrn evaluate {out}`" in capsys.readouterr().out

    predictor = Predictor.from_checkpoint(out, torch.device("cpu"))
    checkpoint = predictor.checkpoint
    assert checkpoint.label_names == VOC_LABELS
    assert checkpoint.thresholds == (0.5,) * 20
    assert checkpoint.config.preset == "voc2007"
    assert checkpoint.config.model.pretrained is None
    assert (checkpoint.config.model.head, checkpoint.config.model.levels) == ("mlp", ("layer2", "layer3", "layer4"))
    assert checkpoint.config.data.word_vectors == str(sources["word_vectors"].resolve())
    np.testing.assert_array_equal(checkpoint.counts.count, golden["counts"])

    images = golden_images(int(golden["salt"]), int(golden["batch"]), int(golden["image_size"]))
    with torch.no_grad():
        output = predictor.model(images)
    np.testing.assert_allclose(
        output.logits.numpy(), golden["logits"], rtol=1e-4, atol=1e-4 * np.abs(golden["logits"]).max()
    )


def refused(message: str, file: Path, preset: str, out: Path, **sources: Any) -> None:
    """Assert the error, and that nothing was written."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(UserError, match=message):
        import_official(file, preset, out=out, **sources)
    assert sorted(out.parent.rglob("*")) == before


def test_files_that_do_not_fit_are_refused(blank: Path, sources: dict[str, Path], shared: Path, tmp_path: Path) -> None:
    folder = shared / "word_vectors"
    out, graph = tmp_path / "out", tmp_path / "graph.npz"
    np.savez(graph, names=np.array(APPAREL_LABELS), adj=np.zeros((11, 11), int), nums=np.ones(11, int))
    apparel = {"word_vectors": folder / "apparel.npz", "graph": graph}
    refused(
        r"voc_checkpoint.*does not fit preset apparel \(11 labels\): .*, not \(\d+", blank, "apparel", out, **apparel
    )
    refused(r"--preset scenes: the authors trained on voc2007, coco2014", blank, "scenes", out, **sources)
    refused(
        r"cooccurrence_coco\.npz.*labels of the data set",
        blank,
        "voc2007",
        out,
        **sources | {"graph": folder / "cooccurrence_coco.npz"},
    )
    refused(r"not an MSRN state dict: .*ProjectM", blank, "voc2007", out, **sources, levels=2)
    refused(r"levels=0", blank, "voc2007", out, **sources, levels=0)
    narrow = tmp_path / "narrow.npz"
    np.savez(narrow, names=np.array(VOC_LABELS), vectors=np.ones((20, 50), np.float32))
    message = r"does not fit preset voc2007.*label_semantics\.input\.weight is \(256, 300\), not \(256, 50\)"
    refused(message, blank, "voc2007", out, **sources | {"word_vectors": narrow})


def test_missing_files_and_existing_folder_are_refused(blank: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    none = tmp_path / "none.npz"
    out = tmp_path / "out"
    refused(r"none\.npz: no such file", none, "voc2007", out, **sources)
    for name in sources:
        refused(r"none\.npz: no such file", blank, "voc2007", out, **sources | {name: none})
    out.mkdir()
    refused(r"out: exists already", blank, "voc2007", out, **sources)


class _Payload:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_files_that_are_no_checkpoints_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    path, out, ran = tmp_path / "bad.pth.tar", tmp_path / "out", tmp_path / "ran"
    torch.save({"state_dict": {"W": torch.ones(1)}, "best_score": _Payload(ran)}, path)
    refused(r"bad\.pth\.tar: cannot be read without running code", path, "voc2007", out, **sources)
    assert not ran.exists()
    path.write_text("no checkpoint")
    refused(r"bad\.pth\.tar", path, "voc2007", out, **sources)
    torch.save({"model": {}}, path)
    refused(r"holds no 'state_dict'", path, "voc2007", out, **sources)
    save(path, {name: tensor for name, tensor in blank_state().items() if name != "fc_label.bias"})
    refused(r"fc_label\.bias missing", path, "voc2007", out, **sources)
    save(path, blank_state() | {"fc2.bias": torch.full((20,), torch.nan)})
    refused(r"not finite", path, "voc2007", out, **sources)
