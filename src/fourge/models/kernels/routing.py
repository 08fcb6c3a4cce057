"""Which experts a token goes to, compiled by numba: the choice of moe.route. See decode.py.

Array suffixes: T tokens, A columns of a joint product, E experts, K chosen ones per token.
"""

from math import exp
from typing import Any

import numpy as np
from numba import boolean, float32, int64, njit, void

Array = np.ndarray[Any, Any]

f32 = np.float32
F1, F2, I2 = float32[::1], float32[:, ::1], int64[:, ::1]
PLAIN: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


@njit(error_model="numpy")
def _keep_best_groups(choice_E: Array, group: int, keep: int) -> None:
    """-inf for the experts of all groups but the ``keep`` best; two best experts are its worth."""
    number = choice_E.size // group
    worth = np.empty(number, f32)
    for g in range(number):
        first, second = f32(-np.inf), f32(-np.inf)
        for e in range(g * group, (g + 1) * group):
            if choice_E[e] > first:
                first, second = choice_E[e], first
            elif choice_E[e] > second:
                second = choice_E[e]
        worth[g] = first + second
    for _ in range(number - keep):
        least = -1
        for g in range(number):
            if worth[g] < f32(np.inf) and (least < 0 or worth[g] <= worth[least]):
                least = g
        if least >= 0:
            worth[least] = f32(np.inf)
            choice_E[least * group : (least + 1) * group] = f32(-np.inf)


@njit(void(F2, F1, int64, int64, boolean, float32, I2, F2), **PLAIN)
def choose_experts(
    joint_TA: Array, bias_E: Array, groups: int, keep: int, normed: bool, factor: np.float32,
    expert_TK: Array, gate_TK: Array,
) -> None:  # fmt: skip
    """Experts and gates of each token, from router logits in the first columns."""
    number, wanted = bias_E.size, expert_TK.shape[1]
    score_E, choice_E = np.empty(number, f32), np.empty(number, f32)
    free_E = np.empty(number, np.bool_)
    for t in range(joint_TA.shape[0]):
        for e in range(number):
            score_E[e] = f32(f32(1.0) / (f32(1.0) + exp(-joint_TA[t, e])))
            choice_E[e] = score_E[e] + bias_E[e]
            free_E[e] = True
        if groups > 1:
            _keep_best_groups(choice_E, number // groups, keep)
        total = f32(0.0)
        for k in range(wanted):
            best = -1
            for e in range(number):
                if free_E[e] and (best < 0 or choice_E[e] > choice_E[best]):
                    best = e
            free_E[best] = False
            expert_TK[t, k], gate_TK[t, k] = best, score_E[best]
            total += score_E[best]
        for k in range(wanted):
            if normed:
                gate_TK[t, k] /= total + f32(1e-20)
            gate_TK[t, k] *= factor
