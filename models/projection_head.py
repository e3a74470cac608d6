"""The head between an encoder's features and the projections that an objective compares."""

from itertools import pairwise

from lightly.models.modules.heads import ProjectionHead
from torch import nn


def build_projection_head(feature_dim: int, *, hidden_dim: int, output_dim: int, num_layers: int = 2) -> nn.Module:
    """Return an MLP: Linear-BN-ReLU for each hidden layer, then Linear-BN, as MIO's authors have it.

    Takes features of shape (N, feature_dim) and gives projections of shape (N, output_dim).
    """
    dims = [feature_dim] + [hidden_dim] * (num_layers - 1)
    blocks = [(i, o, nn.BatchNorm1d(o), nn.ReLU()) for i, o in pairwise(dims)]
    head: nn.Module = ProjectionHead([*blocks, (dims[-1], output_dim, nn.BatchNorm1d(output_dim), None)])
    return head
