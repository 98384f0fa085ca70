"""Local semantics (an embedding per label, by graph attention) and global semantics (an embedding per group of labels).

Shapes: C labels, V word-vector width, G groups, D embedding width.
Source: arXiv 2106.11596, sections 3.1 and 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # the field's name for it

from ..settings import ModelSettings

_GAIN = 1.414  # Xavier gain of the graph attention weights, as in the authors' release


class GraphAttention(nn.Module):
    """Graph attention of one head with a residual on the transformed nodes; no bias, no dropout.

    h = X W;  e_ij = LeakyReLU_0.2(a . [h_i ; h_j]), -inf where i does not attend to j;  X'_i = ELU(sum_j softmax_j(e)_ij h_j + h_i)
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_dim, out_dim))
        self.score = nn.Parameter(torch.empty(2 * out_dim, 1))
        nn.init.xavier_uniform_(self.weight, gain=_GAIN)
        nn.init.xavier_uniform_(self.score, gain=_GAIN)

    def forward(self, nodes: Tensor, attend_mask: Tensor) -> Tensor:
        """Return [C, out_dim]; nodes: [C, in_dim] float; attend_mask: [C, C] bool, True where row attends to column."""
        hidden = nodes @ self.weight
        # a . [h_i ; h_j] = a_1 . h_i + a_2 . h_j, so nothing of size [C, C, 2 * out_dim] is needed
        by_source, by_target = (hidden @ self.score.view(2, -1).t()).unbind(1)
        logits = F.leaky_relu(by_source[:, None] + by_target[None, :], 0.2)
        attention = logits.masked_fill(~attend_mask, float("-inf")).softmax(1)
        return F.elu(attention @ hidden + hidden)


class LabelSemantics(nn.Module):
    """Word vectors -> linear -> two graph attention layers -> E [C, D] (paper section 3.1).

    Args:
        settings: the widths of the layers.
        word_vectors: [C, V] float32.
        attend_mask: [C, C] bool, True on the diagonal.
        train_vectors: whether the word vectors are trained. Their name in the state dict is the same either way.
    """

    word_vectors: Tensor
    attend_mask: Tensor

    def __init__(
        self, settings: ModelSettings, word_vectors: Tensor, attend_mask: Tensor, *, train_vectors: bool = False
    ) -> None:
        super().__init__()
        if train_vectors:
            self.word_vectors = nn.Parameter(word_vectors.clone())  # a copy: processes may share the caller's tensor
        else:
            self.register_buffer("word_vectors", word_vectors)
        self.register_buffer("attend_mask", attend_mask)
        self.input = nn.Linear(word_vectors.shape[1], settings.label_hidden_dim)
        self.first = GraphAttention(settings.label_hidden_dim, settings.graph_hidden_dim)
        self.second = GraphAttention(settings.graph_hidden_dim, settings.embed_dim)

    def forward(self) -> Tensor:
        """Return E [C, D] float32."""
        hidden: Tensor = self.first(self.input(self.word_vectors), self.attend_mask)
        embedding: Tensor = self.second(hidden, self.attend_mask)
        return embedding


class GroupSemantics(nn.Module):
    """Soft assignment of labels to groups and the groups' embeddings, both by graph attention on ReLU(E) (paper section 3.2)."""

    def __init__(self, embed_dim: int, num_groups: int) -> None:
        super().__init__()
        self.embed = GraphAttention(embed_dim, embed_dim)
        self.assign = GraphAttention(embed_dim, num_groups)

    def forward(self, label_embedding: Tensor, attend_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return group embedding Q [G, D] and assignment A [C, G], rows sum to 1; label_embedding: E [C, D]."""
        nodes = label_embedding.relu()
        assignment = self.assign(nodes, attend_mask).softmax(1)
        return assignment.t() @ self.embed(nodes, attend_mask), assignment
