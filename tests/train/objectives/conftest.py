"""The finite oracle: a joint distribution over a few states, every pair of which goes through a loss class itself."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class FiniteOracle:
    """A symmetric, positive semi-definite joint distribution P with integer counts, and its exact solution."""

    first: Tensor
    """State of the first view of every pair, shape (num_pairs,)."""
    second: Tensor
    marginal: Tensor
    """p, shape (n,)."""
    normalized: Tensor
    """P̄ = D^(−1/2) P D^(−1/2)."""
    eigenvalues: Tensor
    """Of P̄, the largest first."""
    eigenvectors: Tensor
    num_features: int = 4

    @property
    def optimum(self):
        return self.eigenvalues[: self.num_features].square().sum().item()

    def train(self, loss, *, num_steps=3000, step=0.15, needs_target=True, seed=0, every=1, look=lambda table: None):
        """Train a free table φ (n x k) by plain steps in function space; return F = D^(1/2) φ and the loss's value.

        ``look`` is shown the table every so many steps.
        """
        generator = torch.Generator().manual_seed(seed)
        table = 0.3 * torch.randn(len(self.marginal), self.num_features, dtype=torch.float64, generator=generator)
        for number in range(num_steps):
            if number and number % every == 0:
                look(table)
            table.requires_grad_()
            online = (table[self.first], table[self.second])
            value = loss(*online, *(z.detach() for z in online)) if needs_target else loss(*online)
            (gradient,) = torch.autograd.grad(value, table)
            table = (table - step * gradient / self.marginal[:, None]).detach()
        return self.marginal.sqrt()[:, None] * table, value.item()

    def second_moment(self, table):
        """E[φ φᵀ] of a table, exactly."""
        return table.T @ (self.marginal[:, None] * table)

    def objective(self, features):
        """2 tr(Fᵀ P̄ F) − ‖FᵀF‖², at most Σ λᵢ²."""
        gram = features.T @ features
        return (2 * (features.T @ self.normalized @ features).trace() - gram.square().sum()).item()

    def reaches_the_optimum(self, features):
        return abs(self.objective(features) - self.optimum) <= 1e-3 * self.optimum

    def is_ordered(self, features):
        """Whether the columns are the eigenvectors in their order, FᵀF being diagonal with the eigenvalues."""
        gram = features.T @ features
        k = self.num_features
        off_diagonal = (gram - gram.diag().diag()).abs().max().item()
        cosines = torch.nn.functional.cosine_similarity(features, self.eigenvectors[:, :k], dim=0).abs()
        diagonal_error = (gram.diag() - self.eigenvalues[:k]).abs().max().item()
        return off_diagonal < 1e-3 and diagonal_error < 1e-3 and cosines.min().item() > 0.999


@pytest.fixture(scope="session")
def finite_oracle():
    # two views of one of six images: P = Σ_m B_m B_mᵀ is symmetric and positive semi-definite with integer counts
    views = torch.tensor(
        [
            [4, 2, 0, 0, 0, 0, 0, 0],
            [0, 5, 2, 0, 0, 0, 0, 0],
            [0, 0, 4, 4, 0, 0, 0, 0],
            [0, 0, 0, 1, 6, 1, 0, 0],
            [0, 0, 0, 0, 0, 4, 3, 1],
            [1, 0, 0, 0, 0, 0, 2, 5],
        ]
    )
    counts = views.T @ views
    states = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    first, second = states.repeat_interleave(counts.flatten(), dim=0).unbind(dim=1)
    joint = counts.double() / counts.sum()
    marginal = joint.sum(dim=1)
    scale = marginal.rsqrt()
    normalized = scale[:, None] * joint * scale[None, :]
    eigenvalues, eigenvectors = torch.linalg.eigh(normalized)
    eigenvalues, eigenvectors = eigenvalues.flip(0), eigenvectors.flip(1)
    gaps = eigenvalues[:5].diff().abs()
    assert gaps.min() >= 0.05, gaps
    return FiniteOracle(first, second, marginal, normalized, eigenvalues, eigenvectors)
