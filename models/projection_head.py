"""The heads between an encoder's features and what an objective compares: projection and prediction."""

from itertools import pairwise

from lightly.models.modules.heads import BYOLPredictionHead, ProjectionHead
from torch import nn

from mio_export.bundle import ProjectorSpec


def build_projector(feature_dim: int, spec: ProjectorSpec) -> nn.Module:
    """Return the projection head that a spec describes, with all of its projections.

    An MLP: Linear-BN-ReLU for each hidden layer, then Linear-BN as MIO's authors have it, or Linear as BYOL's. Takes
    features of shape (N, feature_dim) and gives projections of shape (N, output_dim).
    """
    dims = [feature_dim] + [spec.hidden_dim] * (spec.num_layers - 1)
    blocks = [(i, o, nn.BatchNorm1d(o), nn.ReLU()) for i, o in pairwise(dims)]
    last = nn.BatchNorm1d(spec.output_dim) if spec.norm else None
    head: nn.Module = ProjectionHead([*blocks, (dims[-1], spec.output_dim, last, None)])
    return head


def build_prediction_head(kind: str, *, dim: int, hidden_dim: int) -> nn.Module:
    """Return what predicts one view's projection from the other's, (N, dim) to (N, dim).

    Args:
        kind: ``mlp`` (Linear-BN-ReLU, Linear, as in BYOL), ``linear``, or ``none`` for the identity.
        dim: width of the projections.
        hidden_dim: width of the hidden layer.
    """
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(dim, dim)
    head: nn.Module = BYOLPredictionHead(dim, hidden_dim, dim)
    return head
