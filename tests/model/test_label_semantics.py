"""Label and group embeddings by graph attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from msrn_ray.model import build_model
from msrn_ray.model.label_semantics import GraphAttention, GroupSemantics, LabelSemantics
from msrn_ray.settings import ModelSettings

from .networks import MASK, NUM_LABELS, VECTOR, WIDTH, random, small_network, small_settings, total_loss


def graph_attention(layer: GraphAttention, nodes: Tensor, mask: Tensor) -> Tensor:
    """Return the layer's equations, label by label."""
    hidden = nodes @ layer.weight
    rows = []
    for i in range(len(nodes)):
        seen = [j for j in range(len(nodes)) if mask[i, j]]
        scores = []
        for j in seen:
            score = (layer.score[:, 0] * torch.cat([hidden[i], hidden[j]])).sum()
            scores.append(torch.where(score > 0, score, 0.2 * score))
        share = torch.stack(scores).exp()
        share = share / share.sum()
        summed = sum(weight * hidden[j] for weight, j in zip(share, seen, strict=True)) + hidden[i]
        rows.append(torch.where(summed > 0, summed, summed.exp() - 1))
    return torch.stack(rows)


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_graph_attention_equals_a_loop(seed: int) -> None:
    torch.manual_seed(seed)
    layer = GraphAttention(4, 6).double()
    nodes = random(7, 4, seed=seed, dtype=torch.float64)
    mask = (torch.rand(7, 7) < 0.4) | (torch.eye(7) > 0)
    assert not torch.equal(mask, mask.t())
    expected = graph_attention(layer, nodes, mask)
    torch.testing.assert_close(layer(nodes, mask), expected)
    assert not torch.allclose(layer(nodes, mask.t()), expected), "a transposed mask would not be noticed"


@torch.no_grad()
def test_initial_graph_weights_are_xavier_with_gain() -> None:
    layer = GraphAttention(200, 100)
    bound = 1.414 * math.sqrt(6 / 300)
    assert layer.weight.abs().max() == pytest.approx(bound, rel=0.01)
    assert layer.weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert layer.score.shape == (200, 1)
    assert layer.score.abs().max() == pytest.approx(1.414 * math.sqrt(6 / 201), rel=0.1)


@torch.no_grad()
def test_label_embedding_depends_on_graph_neighbours() -> None:
    torch.manual_seed(0)
    settings = ModelSettings(label_hidden_dim=7, graph_hidden_dim=9, embed_dim=WIDTH)
    semantics = LabelSemantics(settings, random(NUM_LABELS, VECTOR), MASK)
    hidden = semantics.word_vectors @ semantics.input.weight.t() + semantics.input.bias
    expected = graph_attention(semantics.second, graph_attention(semantics.first, hidden, MASK), MASK)
    before = semantics()
    torch.testing.assert_close(before, expected)
    for changed in range(NUM_LABELS):
        semantics.word_vectors.copy_(random(NUM_LABELS, VECTOR))
        semantics.word_vectors[changed] += 3
        moved = {label for label in range(NUM_LABELS) if not torch.allclose(semantics()[label], before[label])}
        two_steps = (MASK.long() @ MASK.long())[:, changed].nonzero().flatten().tolist()
        assert moved == set(two_steps)
        assert (4 in moved) == (changed == 4), "the label that stands alone depends on itself only"


def test_learned_word_vectors_get_gradients() -> None:
    """Learned vectors are a weight with a gradient; network and state dict are otherwise the same."""
    start = random(NUM_LABELS, VECTOR)
    before = start.clone()
    torch.manual_seed(0)
    model = build_model(small_settings(), start, MASK, train_vectors=True)
    fixed = small_network()
    assert list(model.state_dict()) != []
    assert set(model.state_dict()) == set(fixed.state_dict())
    assert "label_semantics.word_vectors" in dict(model.named_parameters())
    assert "label_semantics.word_vectors" not in dict(fixed.named_parameters())
    images = random(2, 3, 64, 64)
    torch.testing.assert_close(model.eval()(images).logits, fixed.eval()(images).logits, rtol=0, atol=0)
    total_loss(model(images)).backward()
    gradient = model.label_semantics.word_vectors.grad
    assert gradient is not None
    assert (gradient.abs().sum(1) > 0).all(), "each label's vector learns"
    with torch.no_grad():
        model.label_semantics.word_vectors.add_(1)
    assert torch.equal(start, before), "the caller's tensor is not trained in place"


@torch.no_grad()
def test_group_embedding_and_assignment() -> None:
    torch.manual_seed(1)
    groups = GroupSemantics(WIDTH, 3)
    embedding = random(NUM_LABELS, WIDTH, seed=3)
    vectors, assignment = groups(embedding, MASK)
    nodes = embedding.clamp(min=0)
    expected = graph_attention(groups.assign, nodes, MASK).softmax(1)
    torch.testing.assert_close(assignment, expected)
    torch.testing.assert_close(vectors, expected.t() @ graph_attention(groups.embed, nodes, MASK))
