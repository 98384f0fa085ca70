"""Parity with the authors' release on golden numbers, and the import of its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from msrn_ray.errors import UserError
from msrn_ray.model import MSRN, build_model
from msrn_ray.official import convert_state_dict, read_official
from msrn_ray.settings import ModelSettings
from msrn_ray.training.losses import classification_loss, group_loss
from msrn_ray.types import MSRNOutput

from .golden import golden_images, load_golden, official_state_dict


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, np.ndarray]:
    return load_golden(shared)


@pytest.fixture(scope="module")
def official(golden: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return official_state_dict(int(golden["salt"]))


@pytest.fixture(scope="module")
def run(golden: dict[str, np.ndarray], official: dict[str, Tensor]) -> tuple[MSRN, MSRNOutput, Tensor, Tensor]:
    """Run our model forward and backward on the golden weights and images."""
    settings = ModelSettings(group_ratio=float(golden["group_ratio"]), pretrained=None)
    vectors, mask = torch.from_numpy(golden["word_vectors"]), torch.from_numpy(golden["attend_mask"]).bool()
    model = build_model(settings, vectors, mask)
    assert isinstance(model, MSRN)
    buffers = {"label_semantics.word_vectors": vectors, "label_semantics.attend_mask": mask}
    model.load_state_dict(convert_state_dict(official) | buffers)  # strict: no entry missing or left over
    model.eval()
    images = golden_images(int(golden["salt"]), int(golden["batch"]), int(golden["image_size"]))
    output = model(images)
    classification = classification_loss(output.logits, torch.from_numpy(golden["target"])).mean()
    groups = 1e-4 * group_loss(output)
    (classification + groups).backward()
    return model, output, classification, groups


@pytest.mark.parametrize("name", ["logits", "label_embedding", "group_embedding", "assignment"])
def test_outputs_equal_the_release(
    run: tuple[MSRN, MSRNOutput, Tensor, Tensor], golden: dict[str, np.ndarray], name: str
) -> None:
    ours = getattr(run[1], name).detach().numpy()
    np.testing.assert_allclose(ours, golden[name], rtol=1e-4, atol=1e-4 * np.abs(golden[name]).max())


def test_losses_equal_the_release(run: tuple[MSRN, MSRNOutput, Tensor, Tensor], golden: dict[str, np.ndarray]) -> None:
    _, _, classification, groups = run
    np.testing.assert_allclose(classification.item(), golden["classification_loss"], rtol=1e-4)
    np.testing.assert_allclose(groups.item(), golden["group_loss"], rtol=1e-4)


def test_gradient_norms_equal_the_release(
    run: tuple[MSRN, MSRNOutput, Tensor, Tensor], golden: dict[str, np.ndarray], official: dict[str, Tensor]
) -> None:
    parameters = dict(run[0].named_parameters())
    compared = 0
    for key in (key for key in golden if key.startswith("grad_norm/")):
        name = key.removeprefix("grad_norm/")
        (ours,) = [ours for ours, tensor in convert_state_dict(official).items() if tensor is official[name]]
        gradient = parameters[ours].grad
        assert gradient is not None, ours
        if golden[key] > 1e-4:
            np.testing.assert_allclose(gradient.norm().item(), golden[key], rtol=1e-3, err_msg=name)
            compared += 1
    assert compared == 12


def test_every_parameter_gets_a_gradient(run: tuple[MSRN, MSRNOutput, Tensor, Tensor]) -> None:
    without = [name for name, parameter in run[0].named_parameters() if parameter.grad is None]
    assert without == []


def test_prefix_and_unused_entries_are_ignored(official: dict[str, Tensor]) -> None:
    plain = convert_state_dict(official)
    extra = {"ProjectMs.0.weight": torch.ones(1)}
    prefixed = convert_state_dict({f"module.{name}": tensor for name, tensor in (official | extra).items()})
    assert prefixed.keys() == plain.keys()
    assert all(torch.equal(prefixed[name], plain[name]) for name in plain)
    assert not any("conv_buffer0" in name or name in {"W", "B"} for name in plain)


def test_elementwise_head_is_read_without_mlp_head(official: dict[str, Tensor]) -> None:
    converted = convert_state_dict(
        {name: tensor for name, tensor in official.items() if not name.startswith("fc")}
        | {name: tensor for name, tensor in official.items() if name.startswith("fc_label")}
    )
    assert torch.equal(converted["head.weight"], official["W"])
    assert torch.equal(converted["head.bias"], official["B"])


def test_missing_and_unknown_names_are_refused(official: dict[str, Tensor]) -> None:
    with pytest.raises(UserError, match=r"ProjectM\.1\.bias missing"):
        convert_state_dict({name: tensor for name, tensor in official.items() if name != "ProjectM.1.bias"})
    with pytest.raises(UserError, match=r"'surprise' is not a name"):
        convert_state_dict(official | {"surprise": torch.ones(1)})
    with pytest.raises(UserError, match="levels=5"):
        convert_state_dict(official, levels=5)


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code from the file was run')",)


def test_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth.tar"
    torch.save({"state_dict": _Payload()}, path)
    with pytest.raises(UserError, match=r"evil\.pth\.tar.*refused"):
        read_official(path)
    with pytest.raises(UserError, match=r"no such file"):
        read_official(tmp_path / "none.pth.tar")
