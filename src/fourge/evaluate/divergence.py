"""KL divergence of next-token distributions, with the vocabulary in pieces.

    KL(p || q) = sum_v p_v (a_v - b_v) - lse(a) + lse(b),    p = softmax(a), q = softmax(b)

a are the reference's logits, b the candidate's; in nats. Sums over the vocabulary run along its
pieces as in online softmax (arXiv 1805.02867): float64 throughout, so that only the logits' own
precision counts. Memory: five numbers a token for each model. Knows no model and no file.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

# T tokens, N tokens of a chunk, V vocabulary entries of a piece


class Positions(NamedTuple):
    """What one candidate is at every position, float64 [T] unless said otherwise."""

    kl: np.ndarray
    agrees: np.ndarray  # bool: both would choose the same token
    nll_reference: np.ndarray  # of the token that follows
    nll_candidate: np.ndarray


class _Softmax:
    """log-sum-exp, largest entry and the target's logit of T rows, over what has been added."""

    def __init__(self, targets_T: torch.Tensor) -> None:
        def full(value: float) -> torch.Tensor:
            return torch.full(targets_T.shape, value, dtype=torch.float64, device=targets_T.device)

        self._targets_T = targets_T
        self._largest_T, self._sum_T = full(-torch.inf), full(0.0)
        self._target_T = full(torch.nan)
        self.best_T = torch.zeros_like(targets_T)

    def add(
        self, rows: slice, first: int, logits_NV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a piece of the vocabulary that begins at ``first``. Returns exp(logits - largest) and
        what earlier sums of such terms must be multiplied by, since the largest has grown.
        """
        old_N = self._largest_T[rows]
        top_N, place_N = logits_NV.max(-1)
        new_N = torch.maximum(old_N, top_N)
        shrink_N = torch.exp(old_N - new_N)
        terms_NV = torch.exp(logits_NV - new_N[:, None])
        self._sum_T[rows] = self._sum_T[rows] * shrink_N + terms_NV.sum(-1)
        self.best_T[rows] = torch.where(top_N > old_N, place_N + first, self.best_T[rows])
        self._largest_T[rows] = new_N
        offset_N = self._targets_T[rows] - first
        inside_N = (offset_N >= 0) & (offset_N < logits_NV.shape[-1])
        found_N = logits_NV.gather(-1, offset_N.clamp(0, logits_NV.shape[-1] - 1)[:, None])[:, 0]
        self._target_T[rows] = torch.where(inside_N, found_N, self._target_T[rows])
        return terms_NV, shrink_N

    @property
    def sum_T(self) -> torch.Tensor:
        return self._sum_T

    def log_sum(self) -> torch.Tensor:
        return self._largest_T + self._sum_T.log()

    def nll(self) -> np.ndarray:
        return (self.log_sum() - self._target_T).cpu().numpy()


class Divergence:
    """Several candidates against one reference, token by token."""

    def __init__(self, targets_T: torch.Tensor, candidates: Sequence[str]) -> None:
        """``targets_T`` int64: the token that follows; on the device where logits will be."""
        self._reference = _Softmax(targets_T)
        self._candidates = {name: _Softmax(targets_T) for name in candidates}
        self._cross_T = {
            name: torch.zeros(targets_T.shape, dtype=torch.float64, device=targets_T.device)
            for name in candidates
        }

    def add(
        self,
        rows: slice,
        first: int,
        reference_NV: torch.Tensor,
        candidates: Mapping[str, torch.Tensor],
    ) -> None:
        """Add the logits of tokens ``rows`` for the vocabulary entries from ``first`` on."""
        reference_NV = reference_NV.double()
        terms_NV, shrink_N = self._reference.add(rows, first, reference_NV)
        for name, softmax in self._candidates.items():
            logits_NV = candidates[name].double()
            softmax.add(rows, first, logits_NV)
            cross_T = self._cross_T[name]
            # 0 * inf where a logit is -inf on both sides cannot happen: lm_head is finite.
            added_N = (terms_NV * (reference_NV - logits_NV)).sum(-1)
            cross_T[rows] = cross_T[rows] * shrink_N + added_N

    def positions(self, name: str) -> Positions:
        """The figures of one candidate, when the whole vocabulary has been added."""
        reference, candidate = self._reference, self._candidates[name]
        kl_T = self._cross_T[name] / reference.sum_T - reference.log_sum() + candidate.log_sum()
        return Positions(
            kl_T.cpu().numpy(),
            (reference.best_T == candidate.best_T).cpu().numpy(),
            reference.nll(),
            candidate.nll(),
        )
