"""What a decode step does between its dense products, on one CPU core, compiled by numba.

A step of few tokens through a small model is bound by the number of calls, not by arithmetic; one
call here stands for some twenty of torch. The dense products stay torch's. References: norm.py,
rope.py, dsa.project and dsa.select_cached, mla.attend_absorbed and
moe.run_fused_experts, to which sums agree but for their order (tests state the tolerance).
Releases the GIL. Compiled at the first import (12 s) and cached as formats/kernels/cpu.py is; numba
looks at this file alone to see whether that is still right, so kernels import no kernels.

Array suffixes: T tokens, D hidden, A columns of a joint product, Q query latent, C key-value
latent, R rotated numbers (tables: R / 2), X = C + R, I index head size or, of experts, intermediate
size, E experts, K selected positions or experts per token, H heads, O rows of keys and values, Z
slots of the cache, L numbers of index keys of all pages, S sequences, or the slots of a page, P
positions, or pages of a sequence.
"""

from typing import Any

import numpy as np
from numba import boolean, float32, int64, njit, void

Array = np.ndarray[Any, Any]

f32, u32, i32, i64 = np.float32, np.uint32, np.int32, np.int64

F1, F2, F3 = float32[::1], float32[:, ::1], float32[:, :, ::1]
I1, I2 = int64[::1], int64[:, ::1]

# Sums may be reordered and fused, so that they vectorise; a NaN stays one.
SUMS = {"reassoc", "contract", "nsz"}
PLAIN: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
SUMMING: dict[str, Any] = PLAIN | {"fastmath": SUMS}
PAGE_BITS = 6
PAGE = 1 << PAGE_BITS
KEY_NORM_EPS = f32(1e-6)
BINS = 256


@njit(fastmath={"contract"}, error_model="numpy")
def _exp(x: np.float32) -> np.float32:
    """e^x within 2 units in the last place, without a call, so that loops of it vectorise:
    2^n e^r with |r| <= ln 2 / 2, and the polynomial of Cephes' expf (Moshier) for e^r.
    """
    inside = min(max(x, f32(-87.0)), f32(88.0))
    n = f32(np.floor(inside * f32(1.44269504) + f32(0.5)))
    r = inside - n * f32(0.693359375) - n * f32(-2.12194440e-4)
    e = f32(1.9875691500e-4) * r + f32(1.3981999507e-3)
    e = e * r + f32(8.3334519073e-3)
    e = e * r + f32(4.1665795894e-2)
    e = e * r + f32(1.6666665459e-1)
    e = e * r + f32(5.0000001201e-1)
    e = e * r * r + r + f32(1.0)
    power = u32((i32(n) + i32(127)) << i32(23)).view(f32)
    return e * power if x == x else x


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


@njit(fastmath=SUMS, error_model="numpy")
def _add4(
    parts: tuple[Any, Any, Any, Any], rows: Array, places: tuple[Any, Any, Any, Any], out: Array,
    at: int, size: int,
) -> None:  # fmt: skip
    """Add to row ``at`` the first ``size`` numbers of four rows, each times its part."""
    a, b, c, d = parts
    first, second, third, fourth = places
    for i in range(size):
        out[at, i] += (
            a * rows[first, i] + b * rows[second, i] + c * rows[third, i] + d * rows[fourth, i]
        )


@njit(error_model="numpy")
def _up_to_4(number: int) -> int:
    return (number + 3) // 4 * 4


@njit(void(F2, F2, F1, float32, F2), **SUMMING)
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


@njit(void(F2, F1, F1, float32, F1, F1, I1, F2, F2, boolean, boolean, I1, F2, F2, F2), **SUMMING)
def keep(
    joint_TA: Array, query_norm_Q: Array, latent_norm_C: Array, eps: np.float32,
    key_norm_I: Array, key_bias_I: Array, position_T: Array, cos_PR: Array, sin_PR: Array,
    interleave: bool, index_interleave: bool, slot_T: Array, latents_ZX: Array, keys_LS: Array,
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
            _layer_norm(joint_A, first_key, key_norm_I, key_bias_I, key_I)
            _rotate(key_I, 0, cos_R, sin_R, index_interleave, key_I, 0)
            first_row, place = (slot_T[t] >> PAGE_BITS) * size, slot_T[t] & PAGE - 1
            for i in range(size):
                keys_LS[first_row + i, place] = key_I[i]


@njit(error_model="numpy")
def _slot(pages_P: Array, place: int) -> int:
    return pages_P[place >> PAGE_BITS] << PAGE_BITS | place & PAGE - 1


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
        count = int(left)


@njit(void(F2, int64, F2, int64, I1, F2, F2, boolean, I1, I2, int64, F2, int64, I2, I1), **SUMMING)
def select(
    query_TA: Array, first_query: int, joint_TA: Array, first_weight: int, position_T: Array,
    cos_PR: Array, sin_PR: Array, interleave: bool,
    sequence_T: Array, page_SP: Array, first: int, keys_LS: Array, heads: int, slot_TK: Array,
    count_T: Array,
) -> None:  # fmt: skip
    """The slots that each token looks at: all up to its own, or the K best of the indexer, whose
    heads are 0 where there is none. Index queries are the columns of ``query_TA`` from
    ``first_query`` on, their size a multiple of 4; head weights those of ``joint_TA`` from
    ``first_weight`` on. Slot 0 of the first page lies ``first`` before position 0.
    """
    size = (query_TA.shape[1] - first_query) // max(heads, 1)
    query, weight_H = np.zeros((heads, size), f32), np.zeros(heads, f32)
    head_1S, score_S = np.empty((1, PAGE), f32), np.empty(PAGE, f32)
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
        for page in range((first + length - 1 >> PAGE_BITS) + 1):
            score_S[:] = f32(0.0)
            for h in range(heads):
                head_1S[:] = f32(0.0)
                for i in range(0, size, 4):
                    row = pages_P[page] * size + i
                    parts = query[h, i], query[h, i + 1], query[h, i + 2], query[h, i + 3]
                    _add4(parts, keys_LS, (row, row + 1, row + 2, row + 3), head_1S, 0, PAGE)
                for s in range(PAGE):
                    score_S[s] += weight_H[h] * max(head_1S[0, s], f32(0.0))
            for s in range(PAGE):
                p = page * PAGE + s - first
                if 0 <= p < length:
                    bits_P[p] = _order_bits(score_S[s])
        _largest(bits_P, length, slot_TK.shape[1], some_P, slot_TK[t])
        for k in range(slot_TK.shape[1]):
            slot_TK[t, k] = _slot(pages_P, slot_TK[t, k] + first)


@njit(fastmath=SUMS, error_model="numpy")
def _softmax(score: Array, row: int, count: int, scale: np.float32) -> None:
    """Of the first ``count`` of a row, in place; 0 up to the next multiple of 4."""
    most, total = score[row, 0], f32(0.0)
    for k in range(count):
        most = max(most, score[row, k])
    for k in range(count):
        score[row, k] = _exp((score[row, k] - most) * scale)
        total += score[row, k]
    for k in range(count):
        score[row, k] /= total
    for k in range(count, _up_to_4(count)):
        score[row, k] = f32(0.0)


@njit(void(F2, I1, F2, F2, boolean, I2, I1, F2, F2, int64, float32, F2), **SUMMING)
def attend(
    query_TA: Array, position_T: Array, cos_PR: Array, sin_PR: Array, interleave: bool,
    slot_TK: Array, count_T: Array, latents_ZX: Array, joint_OC: Array, heads: int,
    scale: np.float32, out_TA: Array,
) -> None:  # fmt: skip
    """Absorbed attention of each token over its slots; the output projection is left out. Rows of
    ``joint_OC``: keys, then values of a head, both multiples of 4, after those of the head before.
    """
    rows, latent, width = joint_OC.shape[0] // heads, joint_OC.shape[1], latents_ZX.shape[1]
    value, rotated = out_TA.shape[1] // heads, width - latent
    nope, padded, most = rows - value, _up_to_4(heads), _up_to_4(slot_TK.shape[1])
    query, mixed = np.zeros((padded, width), f32), np.empty((heads, latent), f32)
    share, slot_K = np.empty((padded, most), f32), np.zeros(most, i64)
    for t in range(position_T.size):
        count = count_T[t]
        slot_K[:count] = slot_TK[t, :count]
        slot_K[count : _up_to_4(count)] = slot_TK[t, 0]  # a share of 0 of a NaN would be one
        cos_R, sin_R = cos_PR[position_T[t]], sin_PR[position_T[t]]
        query[:heads, :latent] = f32(0.0)
        for h in range(heads):
            start, first = h * (nope + rotated), h * rows
            for n in range(0, nope, 4):
                a, b = query_TA[t, start + n], query_TA[t, start + n + 1]
                c, d = query_TA[t, start + n + 2], query_TA[t, start + n + 3]
                row = first + n
                _add4((a, b, c, d), joint_OC, (row, row + 1, row + 2, row + 3), query, h, latent)
            _rotate(query_TA[t], start + nope, cos_R, sin_R, interleave, query[h], latent)
        for k in range(count):
            for h in range(0, padded, 4):
                a, b, c, d = _dot4(query, h, latents_ZX, slot_K[k])
                share[h, k], share[h + 1, k] = a, b
                share[h + 2, k], share[h + 3, k] = c, d
        mixed[:] = f32(0.0)
        for h in range(heads):
            _softmax(share, h, count, scale)
            for k in range(0, _up_to_4(count), 4):
                parts = share[h, k], share[h, k + 1], share[h, k + 2], share[h, k + 3]
                slots = slot_K[k], slot_K[k + 1], slot_K[k + 2], slot_K[k + 3]
                _add4(parts, latents_ZX, slots, mixed, h, latent)
            for v in range(0, value, 4):
                a, b, c, d = _dot4(joint_OC, h * rows + nope + v, mixed, h)
                place = h * value + v
                out_TA[t, place], out_TA[t, place + 1] = a, b
                out_TA[t, place + 2], out_TA[t, place + 3] = c, d


@njit(error_model="numpy")
def _silu(x: np.float32) -> np.float32:
    return f32(x / (f32(1.0) + _exp(-x)))


@njit(void(F2, int64, F2), **PLAIN)
def silu_times(joint_TA: Array, first: int, inner_TI: Array) -> None:
    """silu(gate) * up of columns [gate | up] from ``first`` on."""
    size = inner_TI.shape[1]
    for t in range(joint_TA.shape[0]):
        for i in range(size):
            gate, up = joint_TA[t, first + i], joint_TA[t, first + size + i]
            inner_TI[t, i] = _silu(gate) * up


@njit(void(F2, I2, F2, F3, F3, F2), **SUMMING)
def add_experts(
    x_TD: Array, expert_TK: Array, gate_TK: Array, gate_up_EOD: Array, down_EDI: Array,
    hidden_TD: Array,
) -> None:  # fmt: skip
    """hidden += gate * down(silu(gate x) * up x) of every token's experts, in ascending order.
    D and I must be multiples of 4: rows are taken four at a time.
    """
    tokens, choices = expert_TK.shape
    number, hidden, size = down_EDI.shape
    inner, own_N, gate_N = (
        np.empty((tokens, size), f32),
        np.empty(tokens, i64),
        np.empty(tokens, f32),
    )
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
