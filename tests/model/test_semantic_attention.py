"""Semantic attention, tile by tile and compiled, against its definition, its limits and its memory."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msrn_ray.model import semantic_attention
from msrn_ray.model.semantic_attention import SemanticAttention

from .attention_forms import Attention, both, direct, random, with_gradients

quick = settings(deadline=None, max_examples=30)
SIZES = {"batch": st.integers(1, 3), "positions": st.integers(1, 12), "vectors": st.integers(1, 6)}
WIDTHS = st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 50])
MAGNITUDES = st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4])


@both
@quick
@given(**SIZES, width=WIDTHS, magnitude=MAGNITUDES, seed=st.integers(0, 1000))
def test_equals_the_definition(
    attention: Attention, batch: int, positions: int, vectors: int, width: int, magnitude: float, seed: int
) -> None:
    features, semantics = random(batch, positions, width, seed=seed), random(vectors, width, seed=seed + 1)
    semantics = semantics.clamp(-1, 1) * magnitude
    weight = random(batch, vectors, width, seed=seed + 2)
    expected = with_gradients(direct, features, semantics, weight)
    actual = with_gradients(attention, features, semantics, weight)
    for name, ours, theirs in zip(("output", "features", "semantics"), actual, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11 * max(1, magnitude), msg=lambda m, n=name: n + m)
    assert (actual[0] >= features.amin(1, keepdim=True) - 1e-12).all()
    assert (actual[0] <= features.amax(1, keepdim=True) + 1e-12).all()


@both
@quick
@given(**SIZES, width=WIDTHS, magnitude=MAGNITUDES, seed=st.integers(0, 1000))
def test_single_precision_is_as_good_as_rounding(
    attention: Attention, batch: int, positions: int, vectors: int, width: int, magnitude: float, seed: int
) -> None:
    """The error is that of rounding the inputs; the output exceeds the feature range by at most one rounding."""
    features = random(batch, positions, width, seed=seed, dtype=torch.float32)
    semantics = random(vectors, width, seed=seed + 1, dtype=torch.float32).clamp(-1, 1) * magnitude
    weight = random(batch, vectors, width, seed=seed + 2, dtype=torch.float32)
    output, by_features, by_semantics = with_gradients(attention, features, semantics, weight)
    assert output.dtype == by_features.dtype == by_semantics.dtype == torch.float32
    for tensor in (output, by_features, by_semantics):
        assert torch.isfinite(tensor).all()
    assert (output >= features.amin(1, keepdim=True) - 2e-6).all()
    assert (output <= features.amax(1, keepdim=True) + 2e-6).all()
    if magnitude <= 30:
        exact = with_gradients(direct, features.double(), semantics.double(), weight.double())
        scale = max(1.0, magnitude)
        torch.testing.assert_close(output.double(), exact[0], rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(by_features.double(), exact[1], rtol=1e-4 * scale, atol=1e-5 * scale)
        torch.testing.assert_close(by_semantics.double(), exact[2], rtol=1e-4 * scale, atol=1e-5 * scale)


@both
@pytest.mark.parametrize(("batch", "positions", "vectors", "width"), [(2, 4, 3, 2), (1, 1, 1, 1), (1, 2, 1, 17)])
def test_gradcheck(attention: Attention, batch: int, positions: int, vectors: int, width: int) -> None:
    features = random(batch, positions, width).requires_grad_()
    semantics = random(vectors, width, seed=1, scale=2).requires_grad_()
    assert torch.autograd.gradcheck(attention, (features, semantics))


@both
def test_only_one_input_needs_a_gradient(attention: Attention) -> None:
    features, semantics, weight = random(2, 5, 20), random(3, 20, seed=1), random(2, 3, 20, seed=2)
    _, by_features, by_semantics = with_gradients(direct, features, semantics, weight)
    alone = semantics.clone().requires_grad_()
    (attention(features, alone) * weight).sum().backward()
    torch.testing.assert_close(alone.grad, by_semantics)
    alone = features.clone().requires_grad_()
    (attention(alone, semantics) * weight).sum().backward()
    torch.testing.assert_close(alone.grad, by_features)


@both
def test_limits_are_mean_and_max_pooling(attention: Attention) -> None:
    features = random(2, 7, 18)
    semantics = torch.stack([torch.zeros(18), torch.full((18,), 1e6), torch.full((18,), -1e6)]).double()
    output = attention(features, semantics)
    torch.testing.assert_close(output[:, 0], features.mean(1))
    torch.testing.assert_close(output[:, 1], features.amax(1), rtol=0, atol=1e-9)
    torch.testing.assert_close(output[:, 2], features.amin(1), rtol=0, atol=1e-9)


@both
def test_is_the_derivative_of_log_sum_exp(attention: Attention) -> None:
    """o = d/dq log sum_p exp(q P)."""
    features, semantics = random(1, 6, 20), random(1, 20, seed=1).requires_grad_()
    (slope,) = torch.autograd.grad((semantics * features[0]).logsumexp(0).sum(), semantics)
    torch.testing.assert_close(attention(features, semantics.detach())[0], slope)


@both
@pytest.mark.parametrize("magnitude", [0.0, 1.0, 1e4])
def test_constant_features(attention: Attention, magnitude: float) -> None:
    features = random(2, 1, 17, dtype=torch.float32).expand(2, 9, 17)
    semantics = random(3, 17, seed=1, dtype=torch.float32, scale=magnitude)
    output, by_features, by_semantics = with_gradients(attention, features, semantics, torch.ones(2, 3, 17))
    torch.testing.assert_close(output, features[:, :1].expand(2, 3, 17), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(by_features, torch.full((2, 9, 17), 3 / 9), rtol=1e-2 if magnitude > 1 else 1e-5, atol=0)
    assert by_semantics.abs().max() < 1e-6, "without variance there is nothing to learn"


@both
def test_one_position_passes_through(attention: Attention) -> None:
    features = random(2, 1, 20)
    output = attention(features, random(4, 20, seed=1, scale=100))
    assert torch.equal(output, features.expand(2, 4, 20))


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tilt", [-3.0, 0.0, 3.0])
def test_non_finite_features_become_nan(attention: Attention, bad: float, tilt: float) -> None:
    features, semantics = random(2, 5, 20), torch.full((3, 20), tilt, dtype=torch.float64)
    features[1, 2, 18] = bad
    output = attention(features, semantics)
    assert output[1, :, 18].isnan().all()
    output[1, :, 18] = 0
    assert torch.isfinite(output).all(), "nothing else is touched"
    features[1, 2, 18] = 1
    semantics[2, 3] = math.nan
    output = attention(features, semantics)
    assert output[:, 2, 3].isnan().all()
    output[:, 2, 3] = 0
    assert torch.isfinite(output).all()
    semantics[2, 3] = math.inf
    assert attention(features, semantics)[:, 2, 3].isnan().all()


@pytest.mark.parametrize(
    ("features", "semantics"),
    [
        ((2, 5, 8), (3, 7)),
        ((2, 0, 8), (3, 8)),
        ((5, 8), (3, 8)),
        ((0, 5, 8), (3, 8)),
        ((2, 5, 8), (0, 8)),
        ((2, 5, 0), (3, 0)),
        ((2, 5, 8), (8,)),
        ((2, 5, 8), (2, 3, 8)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(features: tuple[int, ...], semantics: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be") as error:
        semantic_attention(torch.zeros(features), torch.zeros(semantics))
    assert str(features) in str(error.value)
    assert str(semantics) in str(error.value)


@both
def test_full_precision_under_autocast(attention: Attention) -> None:
    features = random(2, 30, 33, dtype=torch.float32)
    semantics = random(5, 33, seed=1, dtype=torch.float32, scale=3)
    expected = direct(features.double(), semantics.double())
    with torch.autocast("cpu", torch.bfloat16):
        output = attention(features, semantics)
        from_half = attention(features.bfloat16(), semantics)
    rounded = semantics.bfloat16()
    torch.testing.assert_close(
        attention(features, rounded).double(), direct(features.double(), rounded.double()), rtol=1e-5, atol=1e-5
    )
    assert output.dtype == from_half.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        from_half.double(), direct(features.bfloat16().double(), semantics.double()), rtol=1e-5, atol=1e-5
    )
    leaf = features.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = attention(leaf, semantics).sum()
    loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16
    exact = leaf.detach().double().requires_grad_()
    direct(exact, semantics.double()).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2e-2, atol=1e-2)


@both
def test_inputs_need_not_be_contiguous(attention: Attention) -> None:
    features, semantics = random(2, 20, 3).permute(0, 2, 1), random(20, 4, seed=1).t()
    assert not features.is_contiguous()
    assert not semantics.is_contiguous()
    weight = random(4, 2, 20, seed=2).transpose(0, 1)
    expected = with_gradients(direct, features, semantics, weight)
    for ours, theirs in zip(with_gradients(attention, features, semantics, weight), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    strided = random(4, 10, 40)[::2, ::2, ::2]
    torch.testing.assert_close(attention(strided, semantics), direct(strided, semantics))


@both
@pytest.mark.parametrize(
    ("batch", "positions", "vectors", "width"), [(2, 49, 24, 64), (2, 196, 24, 64), (2, 49, 96, 64)]
)
def test_memory_kept_for_backward(attention: Attention, batch: int, positions: int, vectors: int, width: int) -> None:
    """At most BND + 3 BQD + QD + 2 BD numbers: neither [B,N,Q,D] nor a part of it."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    features = random(batch, positions, width, dtype=torch.float32).requires_grad_()
    semantics = random(vectors, width, seed=1, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = attention(features, semantics)
    assert output.requires_grad
    allowed = 4 * (batch * width * (positions + 3 * vectors + 2) + vectors * width)
    assert 0 < sum(kept.values()) <= allowed


@both
def test_outlier_costs_only_its_rounding(attention: Attention) -> None:
    features = 0.01 * random(1, 784, 4, dtype=torch.float32)
    features[0, 5] = 100
    semantics = torch.tensor([[1e-4], [-1e-4], [0.0], [3.0]]).expand(4, 4).contiguous()
    weight = torch.ones(1, 4, 4)
    exact = with_gradients(direct, features.double(), semantics.double(), weight.double())
    for ours, theirs in zip(with_gradients(attention, features, semantics, weight), exact, strict=True):
        # N roundings in the mean, as many in each term of the variance
        torch.testing.assert_close(ours.double(), theirs, rtol=3 * 784 * 2**-23, atol=1e-5)


def test_levels_lie_side_by_side() -> None:
    levels = [random(2, 9, 5), random(2, 4, 5, seed=1)]
    semantics = random(3, 5, seed=2)
    output = SemanticAttention()(levels, semantics)
    assert output.shape == (2, 3, 10)
    for index, level in enumerate(levels):
        torch.testing.assert_close(output[..., 5 * index : 5 * index + 5], direct(level, semantics))
