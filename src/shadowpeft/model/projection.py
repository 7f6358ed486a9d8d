"""Eq. 12: the projection that makes a small model's own logits come out of a large model's head."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadowpeft.errors import ArchitectureError
from shadowpeft.model.architectures import finish_of

CHUNK_ROWS = 8192
# Below this ratio of Cholesky's diagonal the Gram matrix is taken for rank-deficient and its eigenvectors decide.
_SAFE_DIAGONAL_RATIO = 1e-6


@dataclass(frozen=True, kw_only=True)
class Projection:
    """P* of Eq. 12.

    Attributes:
        weight: [d, d_s], float64.
        relative_residual: ``||W_lm P - W_ref|| / ||W_ref||`` (Frobenius), measured on the heads themselves: 0 where the
            large head can express the small one, 1 where it can express none of it.
        rank: directions of the large head that were used; d unless its columns depend on one another.
    """

    weight: Tensor
    relative_residual: float
    rank: int


@torch.no_grad()
def solve_projection(head: Tensor, reference: Tensor, *, chunk_rows: int = CHUNK_ROWS) -> Projection:
    """``P* = pinv(W_lm) W_ref``, the least-squares solution of smallest norm.

    Through the normal equations in float64, ``(W_lm' W_lm) P = W_lm' W_ref``, both sides summed over chunks of the
    vocabulary, with one step of refinement on the true residual. Beside the heads, memory holds float64 matrices of
    d x d, d x d_s and one chunk: for a 151,936 x 4096 head and d_s = 1024 that is 0.5 GB, where a float64 copy of the
    head would be 5.0 GB and its pseudo-inverse as much again.

    Args:
        head: W_lm [V, d] of the large model, any dtype and device.
        reference: W_ref [V, d_s] of the small one.
        chunk_rows: rows of the vocabulary that are float64 at a time.

    Raises:
        ArchitectureError: the vocabularies differ, or a head holds values that are not finite.
    """
    if head.dim() != 2 or reference.dim() != 2 or head.shape[0] != reference.shape[0]:
        raise ArchitectureError(
            f"the heads must be [V, d] and [V, d_s] with one vocabulary, not {list(head.shape)} and "
            f"{list(reference.shape)}: both models must use the same tokenizer"
        )
    gram = _sum_products(head, head, chunk_rows)
    right = _sum_products(head, reference, chunk_rows)
    if not (gram.isfinite().all() and right.isfinite().all()):
        raise ArchitectureError("a head holds values that are not finite; load the models in float32 or bfloat16")
    solver = _Solver.of(gram)
    weight = solver(right)
    correction, _, _ = _residual(head, reference, weight, chunk_rows)
    weight = weight + solver(correction)
    _, error, norm = _residual(head, reference, weight, chunk_rows)
    return Projection(weight=weight, relative_residual=(error / norm) ** 0.5 if norm else 0.0, rank=solver.rank)


def projection_between(base: PreTrainedModel, small: PreTrainedModel) -> Projection:
    """:func:`solve_projection` for two causal language models, with the factors that they put on their logits.

    Raises:
        ArchitectureError: no head, a head with a bias, or two vocabularies.
    """
    head, reference = _head(base), _head(small)
    solved = solve_projection(head.weight, reference.weight.to(head.weight.device))
    factor = finish_of(small.config)[0] / finish_of(base.config)[0]
    return Projection(
        weight=solved.weight * factor, relative_residual=solved.relative_residual, rank=solved.rank
    )


def _head(model: PreTrainedModel) -> nn.Linear:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ArchitectureError(f"{type(model).__name__} has no language-model head to project to or from")
    if head.bias is not None:
        raise ArchitectureError(
            f"the head of {type(model).__name__} has a bias, which no projection of the hidden state can express"
        )
    return head


@dataclass(frozen=True)
class _Solver:
    """Applies the (pseudo-)inverse of a Gram matrix [d, d]."""

    rank: int
    cholesky: Tensor | None = None
    inverse_root: Tensor | None = None

    @classmethod
    def of(cls, gram: Tensor) -> "_Solver":
        factor, failed = torch.linalg.cholesky_ex(gram)
        diagonal = factor.diagonal()
        if not failed and diagonal.min() > _SAFE_DIAGONAL_RATIO * diagonal.max():
            return cls(rank=len(gram), cholesky=factor)
        values, vectors = torch.linalg.eigh(gram)
        kept = values > len(gram) * torch.finfo(gram.dtype).eps * values[-1].clamp(min=0)
        return cls(rank=int(kept.sum()), inverse_root=vectors[:, kept] * values[kept].rsqrt())

    def __call__(self, right: Tensor) -> Tensor:
        if self.cholesky is not None:
            return torch.cholesky_solve(right, self.cholesky)
        assert self.inverse_root is not None
        return self.inverse_root @ (self.inverse_root.T @ right)


def _chunks(left: Tensor, right: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, left.shape[0], rows):
        yield left[start : start + rows].double(), right[start : start + rows].double()


def _sum_products(left: Tensor, right: Tensor, rows: int) -> Tensor:
    """``left' right`` in float64."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
    for a, b in _chunks(left, right, rows):
        total.addmm_(a.T, b)
    return total


def _residual(head: Tensor, reference: Tensor, weight: Tensor, rows: int) -> tuple[Tensor, float, float]:
    """(``W_lm' R``, ``||R||^2``, ``||W_ref||^2``) for ``R = W_ref - W_lm P``."""
    projected = torch.zeros_like(weight)
    error = norm = 0.0
    for a, b in _chunks(head, reference, rows):
        remainder = torch.addmm(b, a, weight, alpha=-1)
        projected.addmm_(a.T, remainder)
        error += remainder.square().sum().item()
        norm += b.square().sum().item()
    return projected, error, norm
