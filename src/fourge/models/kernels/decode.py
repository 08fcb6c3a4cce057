"""What a decode step does between its dense products, on one CPU core, compiled by numba.

A step of few tokens through a small model is bound by the number of calls, not by arithmetic; one
call here stands for some twenty of torch. The dense products stay torch's. References: norm.py,
rope.py, dsa.project and dsa.select_cached, mla.attend_absorbed, moe.route and
moe.run_fused_experts, to which sums agree but for their order (tests state the tolerance).
Releases the GIL. Compiled at the first import (%COMPILE% s) and cached as formats/kernels/cpu.py is.

Array suffixes: T tokens, D hidden, A columns of a joint product, Q query latent, C key-value
latent, R rotated numbers (tables: R / 2), X = C + R, I index head size or, of experts, intermediate
size, E experts, K selected positions or experts per token, H heads, O key and value rows of a head,
Z slots of the cache, P pages of a sequence, S sequences.
"""

from math import exp
from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]

f32, u32, i64 = np.float32, np.uint32, np.int64

# Sums may be reordered and fused, so that they vectorise; a NaN stays one.
SUMS = {"reassoc", "contract", "nsz"}
PAGE_BITS = 6
KEY_NORM_EPS = f32(1e-6)
BINS = 256


@njit(fastmath=SUMS, error_model="numpy")
def _rms_norm(x_A: Array, start: int, weight_D: Array, eps: np.float32, out_D: Array) -> None:
    square = f32(0.0)
    for i in range(weight_D.size):
        square += x_A[start + i] * x_A[start + i]
    scale = f32(1.0) / np.sqrt(square / f32(weight_D.size) + eps)
    for i in range(weight_D.size):
        out_D[i] = x_A[start + i] * scale * weight_D[i]


@njit(error_model="numpy")
def _rotate(
    x_A: Array, start: int, cos_R: Array, sin_R: Array, interleave: bool, out: Array, at: int
) -> None:
    half = cos_R.size
    step, apart = (2, 1) if interleave else (1, half)
    for i in range(half):
        one = i * step
        first, second = x_A[start + one], x_A[start + one + apart]
        out[at + one] = first * cos_R[i] - second * sin_R[i]
        out[at + one + apart] = second * cos_R[i] + first * sin_R[i]


@njit(fastmath=SUMS, error_model="numpy")
def _dot4(
    rows: Array, first: int, others: Array, other: int
) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    """A row times four neighbouring ones: each of its numbers is read once, and sums do not wait
    for each other. Rows come as numbers, since a view costs two atomic counts.
    """
    a, b, c, d = f32(0.0), f32(0.0), f32(0.0), f32(0.0)
    for i in range(rows.shape[1]):
        number = others[other, i]
        a += rows[first, i] * number
        b += rows[first + 1, i] * number
        c += rows[first + 2, i] * number
        d += rows[first + 3, i] * number
    return a, b, c, d


@njit(
    "void(float32[:, ::1], float32[:, ::1], float32[::1], float32, float32[:, ::1])",
    nogil=True,
    cache=True,
    fastmath=SUMS,
    error_model="numpy",
)
def add_and_norm(
    hidden_TD: Array, addend_TD: Array, weight_D: Array, eps: np.float32, x_TD: Array
) -> None:
    """hidden += addend, and x = rms_norm(hidden). An addend without rows is none."""
    for t in range(hidden_TD.shape[0]):
        if addend_TD.shape[0]:
            for i in range(hidden_TD.shape[1]):
                hidden_TD[t, i] += addend_TD[t, i]
        _rms_norm(hidden_TD[t], 0, weight_D, eps, x_TD[t])


@njit(fastmath=SUMS, error_model="numpy")
def _layer_norm(x_A: Array, start: int, weight_I: Array, bias_I: Array, out_I: Array) -> None:
    size, mean, square = weight_I.size, f32(0.0), f32(0.0)
    for i in range(size):
        mean += x_A[start + i]
    mean /= f32(size)
    for i in range(size):
        square += (x_A[start + i] - mean) ** 2
    scale = f32(1.0) / np.sqrt(square / f32(size) + KEY_NORM_EPS)
    for i in range(size):
        out_I[i] = (x_A[start + i] - mean) * scale * weight_I[i] + bias_I[i]


@njit(
    "void(float32[:, ::1], float32[::1], float32[::1], float32, float32[::1], float32[::1],"
    "int64[::1], float32[:, ::1], float32[:, ::1], boolean, boolean, int64[::1], float32[:, ::1],"
    "float32[:, ::1], float32[:, ::1])",
    nogil=True,
    cache=True,
    fastmath=SUMS,
    error_model="numpy",
)
def keep(
    joint_TA: Array, query_norm_Q: Array, latent_norm_C: Array, eps: np.float32,
    key_norm_I: Array, key_bias_I: Array, position_T: Array, cos_PR: Array, sin_PR: Array,
    interleave: bool, index_interleave: bool, slot_T: Array, latents_ZX: Array, keys_ZI: Array,
    query_TQ: Array,
) -> None:  # fmt: skip
    """Columns [query | c | kr | index key] of ``joint_TA``: normed queries, rows of the cache. A
    norm of no numbers: there are no such columns.
    """
    num_query, num_latent, size = query_norm_Q.size, latent_norm_C.size, key_norm_I.size
    first_key = num_query + latents_ZX.shape[1]
    key_I = np.empty(size, f32)
    for t in range(joint_TA.shape[0]):
        joint_A, row_X = joint_TA[t], latents_ZX[slot_T[t]]
        cos_R, sin_R = cos_PR[position_T[t]], sin_PR[position_T[t]]
        if num_query:
            _rms_norm(joint_A, 0, query_norm_Q, eps, query_TQ[t])
        _rms_norm(joint_A, num_query, latent_norm_C, eps, row_X)
        _rotate(joint_A, num_query + num_latent, cos_R, sin_R, interleave, row_X, num_latent)
        if size:
            own_I = keys_ZI[slot_T[t]]
            _layer_norm(joint_A, first_key, key_norm_I, key_bias_I, key_I)
            own_I[:] = key_I
            _rotate(key_I, 0, cos_R, sin_R, index_interleave, own_I, 0)


@njit(error_model="numpy")
def _slot(pages_P: Array, place: int) -> int:
    return pages_P[place >> PAGE_BITS] << PAGE_BITS | place & (1 << PAGE_BITS) - 1


@njit(error_model="numpy")
def _order_bits(score: np.float32) -> np.uint32:
    """Bits that order as the scores do."""
    bits = f32(score).view(u32)
    return ~bits if bits >> u32(31) else bits | u32(0x80000000)


@njit(error_model="numpy")
def _largest(bits_P: Array, count: int, wanted: int, some_P: Array, chosen_K: Array) -> None:
    """Places of the ``wanted`` largest of ``count`` into ``chosen_K``. What is left is spread over
    a histogram of its range: those above the bin of the last one wanted are in, that bin is left.
    """
    histogram = np.empty(BINS, i64)
    found = 0
    for p in range(count):
        some_P[p] = p
    while found < wanted:
        low, high = bits_P[some_P[0]], bits_P[some_P[0]]
        for p in range(count):
            low, high = min(low, bits_P[some_P[p]]), max(high, bits_P[some_P[p]])
        if low == high:
            chosen_K[found:wanted] = some_P[: wanted - found]
            break
        shift = u32(0)
        while (high - low) >> shift >= BINS:
            shift += u32(1)
        histogram[:] = 0
        for p in range(count):
            histogram[(bits_P[some_P[p]] - low) >> shift] += 1
        last, above = BINS - 1, found
        while above + histogram[last] < wanted:
            above += histogram[last]
            last -= 1
        left = 0
        for p in range(count):
            place = some_P[p]
            own = i64((bits_P[place] - low) >> shift)
            if own > last:
                chosen_K[found] = place
                found += 1
            some_P[left] = place
            left += i64(own == last)
        count = left


@njit(
    "void(float32[:, ::1], int64, float32[:, ::1], int64, int64[::1], float32[:, ::1],"
    "float32[:, ::1], boolean, int64[::1], int64[:, ::1], int64, float32[:, ::1], int64[:, ::1],"
    "int64[::1])",
    nogil=True,
    cache=True,
    fastmath=SUMS,
    error_model="numpy",
)
def select(
    query_TA: Array, first_query: int, joint_TA: Array, first_weight: int, position_T: Array,
    cos_PR: Array, sin_PR: Array, interleave: bool,
    sequence_T: Array, page_SP: Array, first: int, keys_ZI: Array, slot_TK: Array, count_T: Array,
) -> None:  # fmt: skip
    """The slots that each token looks at: all up to its own, or the K best of the indexer. Index
    queries are the columns of ``query_TA`` from ``first_query`` on, head weights those of
    ``joint_TA`` from ``first_weight`` on; no more columns: no indexer.
    """
    size = keys_ZI.shape[1]
    heads = (query_TA.shape[1] - first_query) // size
    padded = (heads + 3) // 4 * 4
    query, weight_H = np.zeros((padded, size), f32), np.zeros(padded, f32)
    longest = position_T.max() + 1
    bits_P, some_P = np.empty(longest, u32), np.empty(longest, i64)
    for t in range(position_T.size):
        pages_P, length = page_SP[sequence_T[t]], position_T[t] + 1
        count_T[t] = min(length, slot_TK.shape[1])
        if length <= slot_TK.shape[1]:
            for p in range(length):
                slot_TK[t, p] = _slot(pages_P, p + first)
            continue
        cos_R, sin_R = cos_PR[position_T[t]], sin_PR[position_T[t]]
        for h in range(heads):
            weight_H[h] = joint_TA[t, first_weight + h]
            start = first_query + h * size
            for i in range(size):
                query[h, i] = query_TA[t, start + i]
            _rotate(query_TA[t], start, cos_R, sin_R, interleave, query[h], 0)
        for p in range(length):
            slot = _slot(pages_P, p + first)
            score = f32(0.0)
            for h in range(0, padded, 4):
                a, b, c, d = _dot4(query, h, keys_ZI, slot)
                score += weight_H[h] * max(a, f32(0.0)) + weight_H[h + 1] * max(b, f32(0.0))
                score += weight_H[h + 2] * max(c, f32(0.0)) + weight_H[h + 3] * max(d, f32(0.0))
            bits_P[p] = _order_bits(score)
        _largest(bits_P, length, slot_TK.shape[1], some_P, slot_TK[t])
        for k in range(slot_TK.shape[1]):
            slot_TK[t, k] = _slot(pages_P, slot_TK[t, k] + first)


@njit(
    "void(float32[:, ::1], int64[::1], float32[:, ::1], float32[:, ::1], boolean, int64[:, ::1],"
    "int64[::1], float32[:, ::1], float32[:, :, ::1], float32, float32[:, ::1])",
    nogil=True,
    cache=True,
    fastmath=SUMS,
    error_model="numpy",
)
def attend(
    query_TA: Array, position_T: Array, cos_PR: Array, sin_PR: Array, interleave: bool,
    slot_TK: Array, count_T: Array, latents_ZX: Array, joint_HOC: Array, scale: np.float32,
    out_TA: Array,
) -> None:  # fmt: skip
    """Absorbed attention of each token over its slots; the output projection is left out."""
    heads, rows, latent = joint_HOC.shape
    width, rotated = latents_ZX.shape[1], 2 * cos_PR.shape[1]
    value = out_TA.shape[1] // heads
    nope, padded = rows - value, (heads + 3) // 4 * 4
    query, mixed = np.zeros((padded, width), f32), np.empty((heads, latent), f32)
    share = np.empty((padded, slot_TK.shape[1]), f32)
    for t in range(position_T.size):
        count = count_T[t]
        for h in range(heads):
            start = h * (nope + rotated)
            for c in range(latent):
                query[h, c] = f32(0.0)
            for n in range(nope):
                number = query_TA[t, start + n]
                for c in range(latent):
                    query[h, c] += number * joint_HOC[h, n, c]
            cos_R, sin_R = cos_PR[position_T[t]], sin_PR[position_T[t]]
            _rotate(query_TA[t], start + nope, cos_R, sin_R, interleave, query[h], latent)
        for k in range(count):
            slot = slot_TK[t, k]
            for h in range(0, padded, 4):
                a, b, c, d = _dot4(query, h, latents_ZX, slot)
                share[h, k], share[h + 1, k] = a, b
                share[h + 2, k], share[h + 3, k] = c, d
        for h in range(heads):
            most, total = share[h, 0], f32(0.0)
            for k in range(count):
                most = max(most, share[h, k])
            for k in range(count):
                share[h, k] = f32(exp((share[h, k] - most) * scale))
                total += share[h, k]
            for c in range(latent):
                mixed[h, c] = f32(0.0)
            for k in range(count):
                slot, part = slot_TK[t, k], share[h, k] / total
                for c in range(latent):
                    mixed[h, c] += part * latents_ZX[slot, c]
            for v in range(value):
                total = f32(0.0)
                for c in range(latent):
                    total += joint_HOC[h, nope + v, c] * mixed[h, c]
                out_TA[t, h * value + v] = total


@njit(error_model="numpy")
def _silu(x: np.float32) -> np.float32:
    return f32(x / (f32(1.0) + f32(exp(-x))))


@njit(
    "void(float32[:, ::1], int64, float32[:, ::1])", nogil=True, cache=True, error_model="numpy"
)
def silu_times(joint_TA: Array, first: int, inner_TI: Array) -> None:
    """silu(gate) * up of columns [gate | up] from ``first`` on."""
    size = inner_TI.shape[1]
    for t in range(joint_TA.shape[0]):
        for i in range(size):
            gate, up = joint_TA[t, first + i], joint_TA[t, first + size + i]
            inner_TI[t, i] = _silu(gate) * up


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


@njit(
    "void(float32[:, ::1], float32[::1], int64, int64, boolean, float32, int64[:, ::1],"
    "float32[:, ::1])",
    nogil=True,
    cache=True,
    error_model="numpy",
)
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
            score_E[e] = f32(f32(1.0) / (f32(1.0) + f32(exp(-joint_TA[t, e]))))
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


@njit(
    "void(float32[:, ::1], int64[:, ::1], float32[:, ::1], float32[:, :, ::1], float32[:, :, ::1],"
    "float32[:, ::1])",
    nogil=True,
    cache=True,
    fastmath=SUMS,
    error_model="numpy",
)
def add_experts(
    x_TD: Array, expert_TK: Array, gate_TK: Array, gate_up_EOD: Array, down_EDI: Array,
    hidden_TD: Array,
) -> None:  # fmt: skip
    """hidden += gate * down(silu(gate x) * up x) of every token's experts, in ascending order.
    D and I must be multiples of 4: rows are taken four at a time.
    """
    tokens, choices = expert_TK.shape
    number, hidden, size = down_EDI.shape
    inner, own_N, gate_N = np.empty((tokens, size), f32), np.empty(tokens, i64), np.empty(tokens, f32)
    for e in range(number):
        count = 0
        for t in range(tokens):
            for k in range(choices):
                if expert_TK[t, k] == e:
                    own_N[count], gate_N[count] = t, gate_TK[t, k]
                    count += 1
        if not count:
            continue
        gate_up_OD, down_DI = gate_up_EOD[e], down_EDI[e]
        for i in range(0, size, 4):
            for n in range(count):
                gate_a, gate_b, gate_c, gate_d = _dot4(gate_up_OD, i, x_TD, own_N[n])
                a, b, c, d = _dot4(gate_up_OD, size + i, x_TD, own_N[n])
                inner[n, i], inner[n, i + 1] = _silu(gate_a) * a, _silu(gate_b) * b
                inner[n, i + 2], inner[n, i + 3] = _silu(gate_c) * c, _silu(gate_d) * d
        for row in range(0, hidden, 4):
            for n in range(count):
                t, gate = own_N[n], gate_N[n]
                a, b, c, d = _dot4(down_DI, row, inner, n)
                hidden_TD[t, row] += gate * a
                hidden_TD[t, row + 1] += gate * b
                hidden_TD[t, row + 2] += gate * c
                hidden_TD[t, row + 3] += gate * d
