"""Which drafts stand, and which token follows them: the output's law is the target's, exactly.

p_i target and q_i draft distribution of place i = 1..k, d_i the draft, drawn from q_i. Standard:
accept d_i while u_i q_i(d_i) < p_i(d_i); at the first that is not, draw from max(p_i - q_i, 0); if
all stand, draw one more from p_k+1 (Leviathan et al., arXiv 2211.17192). Block: with w_0 = 1,
w_i = min(1, w_i-1 p_i(d_i) / q_i(d_i)) and r_i = sum max(w_i p_i+1 - q_i+1, 0), keep the longest i
with u_i <= r_i / (r_i + 1 - w_i), at the last draft u_k <= w_k, and draw from
max(w_i p_i+1 - q_i+1, 0) (Sun et al., arXiv 2403.10444). A certain draft has q_i = 1 at d_i.
"""

from typing import NamedTuple

import torch

from fourge.engine.randomness import draw

# B requests, K drafts, V vocabulary


class Verdict(NamedTuple):
    """What became of the drafts of B requests."""

    accepted_B: torch.Tensor  # how many of the first drafts stand
    token_B: torch.Tensor  # what follows them


def verify(
    target_BPV: torch.Tensor,
    draft_BK: torch.Tensor,
    draft_probs_BKV: torch.Tensor,
    u_accept_BK: torch.Tensor,
    u_choose_BP: torch.Tensor,
    *,
    block: bool = False,
) -> Verdict:
    """P = K + 1. A draft of -1 is none and the last; its row of ``draft_probs_BKV`` is 0.
    ``u_choose_BP``: of each place at which the next token may be drawn.
    """
    count, num_drafts = draft_BK.shape
    u_choose_BP = u_choose_BP.to(target_BPV.device)
    if not num_drafts:
        return Verdict(draft_BK.new_zeros(count), draw(target_BPV[:, 0], u_choose_BP[:, 0]))
    exists_BK = draft_BK >= 0
    index_BK1 = draft_BK.clamp(min=0).unsqueeze(-1)
    p_BK = target_BPV[:, :-1].gather(2, index_BK1).squeeze(-1).double()
    q_BK = draft_probs_BKV.gather(2, index_BK1).squeeze(-1).double()
    u_BK = u_accept_BK.to(p_BK)
    # What is drawn from after i drafts, up to a factor; where no draft follows, the target itself.
    nothing_B1V = torch.zeros_like(draft_probs_BKV[:, :1])
    draft_BPV = torch.cat([draft_probs_BKV, nothing_B1V], 1)
    if block:
        accepted_B, weight_B = _longest_block(target_BPV, draft_BPV, p_BK, q_BK, exists_BK, u_BK)
    else:
        stands_BK = exists_BK & (u_BK * q_BK < p_BK)
        accepted_B = stands_BK.long().cumprod(-1).sum(-1)
        weight_B = torch.ones_like(p_BK[:, 0])
    own_B = torch.arange(count, device=draft_BK.device)
    target_BV, draft_BV = target_BPV[own_B, accepted_B], draft_BPV[own_B, accepted_B]
    rest_BV = (weight_B[:, None] * target_BV - draft_BV).clamp_(min=0)
    # Where p and q are equal but for rounding, nothing is left, and the event has no probability.
    rest_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, target_BV.double())
    return Verdict(accepted_B, draw(rest_BV, u_choose_BP[own_B, accepted_B]))


def _longest_block(
    target_BPV: torch.Tensor,
    draft_BPV: torch.Tensor,
    p_BK: torch.Tensor,
    q_BK: torch.Tensor,
    exists_BK: torch.Tensor,
    u_BK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many drafts stand, and the weight of the target after them."""
    weight_B = torch.ones_like(p_BK[:, 0])
    accepted_B = torch.zeros_like(p_BK[:, 0], dtype=torch.long)
    best_B = weight_B.clone()
    for place in range(p_BK.shape[1]):
        ratio_B = torch.where(q_BK[:, place] > 0, p_BK[:, place] / q_BK[:, place], 0.0)
        weight_B = torch.where(exists_BK[:, place], (weight_B * ratio_B).clamp(max=1.0), 0.0)
        follows = place + 1
        rest_B = (weight_B[:, None] * target_BPV[:, follows] - draft_BPV[:, follows]).clamp(min=0)
        rest_B = rest_B.sum(-1)
        chance_B = rest_B / (rest_B + 1 - weight_B)
        last_B = draft_BPV[:, follows].sum(-1) == 0
        chance_B = torch.where(last_B, weight_B, chance_B)
        stands_B = exists_BK[:, place] & (u_BK[:, place] < chance_B)
        accepted_B = torch.where(stands_B, place + 1, accepted_B)
        best_B = torch.where(stands_B, weight_B, best_B)
    return accepted_B, best_B
