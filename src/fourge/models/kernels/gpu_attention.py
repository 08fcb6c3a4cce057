"""Absorbed attention of few queries over chosen rows of a paged cache, in two Triton kernels.

mla.mix without a copy of the rows: a program takes one query, some of its heads and a part of the
chosen rows, reads them where they lie, and leaves numerators, largest scores and denominators;
_merge joins the parts. Rows are BF16 [c | kr], or the FP8 rows of formats/cache_rows.py, whose
scales are powers of two, so that their values in BF16 are exact.

Suffixes: T queries, H heads, X = C + R latent and rotated numbers, K chosen rows, L parts.
"""

# Triton may not be installed; where it is, its types are those of its compiler, not of kernels.
# pyright: reportMissingImports=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fourge.formats.cache_rows import SCALE_GROUP


class _Tile(NamedTuple):
    """What a program takes: heads (at least 16, for tl.dot), rows per step, warps."""

    heads: int
    rows: int
    warps: int


# The best of a dozen on an H200, and one that fits in 99 KB of shared memory.
LARGE, SMALL = _Tile(64, 64, 8), _Tile(16, 32, 4)
LARGE_BYTES = 224 << 10  # of shared memory
ENOUGH_PROGRAMS = 128  # that keep the multiprocessors of a large GPU busy


def can_attend(rows: torch.Tensor, latent: int) -> bool:
    """Whether ``attend_rows`` takes these."""
    whole = latent == triton.next_power_of_2(latent) and latent >= 16
    return rows.is_cuda and rows.dtype in (torch.bfloat16, torch.uint8) and whole


def attend_rows(
    query_THX: torch.Tensor, rows: torch.Tensor, slot_TK: torch.Tensor, seen_TK: torch.Tensor,
    scale: float, latent: int,
) -> torch.Tensor:  # fmt: skip
    """As mla.mix over the rows of ``slot_TK``, for bfloat16 queries: [T, H, C]. Does not wait for
    the device.
    """
    num_tokens, num_heads, width = query_THX.shape
    num_rows = slot_TK.shape[1]
    device = torch.cuda.get_device_properties(query_THX.device)
    tile = LARGE if device.shared_memory_per_block_optin >= LARGE_BYTES else SMALL
    blocks = triton.cdiv(num_heads, tile.heads)
    steps = triton.cdiv(num_rows, tile.rows)
    num_parts = min(steps, triton.cdiv(ENOUGH_PROGRAMS, num_tokens * blocks))
    steps = triton.cdiv(steps, num_parts)
    num_parts = triton.cdiv(num_rows, steps * tile.rows)
    mixed_TLHC = query_THX.new_empty(num_tokens, num_parts, num_heads, latent, dtype=torch.float32)
    stats_2TLH = query_THX.new_empty(2, num_tokens, num_parts, num_heads, dtype=torch.float32)
    out_THC = query_THX.new_empty(num_tokens, num_heads, latent)
    rotated = width - latent
    with torch.cuda.device_of(query_THX):
        _attend[(num_tokens, blocks, num_parts)](
            query_THX.contiguous(), rows, slot_TK.contiguous(), seen_TK.contiguous(),
            mixed_TLHC, *stats_2TLH, scale * 1.4426950408889634, num_rows, steps * tile.rows,
            H=num_heads, C=latent, R=rotated, R_POW2=max(16, triton.next_power_of_2(rotated)),
            ROW=rows.shape[1], FP8=rows.dtype == torch.uint8, GROUP=min(latent, SCALE_GROUP),
            TILE_H=tile.heads, TILE_K=tile.rows, num_warps=tile.warps, num_stages=2,
        )  # fmt: skip
        _merge[(num_tokens, num_heads)](
            mixed_TLHC, *stats_2TLH, out_THC, num_parts,
            H=num_heads, C=latent, L_POW2=triton.next_power_of_2(num_parts), num_warps=4,
        )  # fmt: skip
    return out_THC


@triton.jit(do_not_specialize=["num_rows", "part"])
def _attend(
    query, rows, slots, seen, mixed, most, total, scale, num_rows, part,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, R_POW2: tl.constexpr, ROW: tl.constexpr,
    FP8: tl.constexpr, GROUP: tl.constexpr, TILE_H: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """mixed [T, L, H, C], most and total [T, L, H] of the rows of a part; ``scale`` in powers of
    two.
    """
    token = tl.program_id(0)
    h_H = tl.program_id(1) * TILE_H + tl.arange(0, TILE_H)
    inside_H = h_H < H
    c_C = tl.arange(0, C)
    r_R = tl.arange(0, R_POW2)
    inside_R = r_R < R
    query_H1 = query + (token * H + h_H)[:, None] * (C + R)
    query_HC = tl.load(query_H1 + c_C[None, :], inside_H[:, None], 0.0)
    query_HR = tl.load(query_H1 + (C + r_R)[None, :], inside_H[:, None] & inside_R[None, :], 0.0)
    most_H = tl.full((TILE_H,), float("-inf"), tl.float32)
    total_H = tl.zeros((TILE_H,), tl.float32)
    mixed_HC = tl.zeros((TILE_H, C), tl.float32)
    first = tl.program_id(2) * part
    for k in range(first, min(first + part, num_rows), TILE_K):
        k_K = k + tl.arange(0, TILE_K)
        inside_K = k_K < num_rows
        place_K = token.to(tl.int64) * num_rows + k_K
        slot_K = tl.load(slots + place_K, inside_K, 0).to(tl.int64)
        seen_K = tl.load(seen + place_K, inside_K, 0) != 0
        latent_KC, rotated_KR = _keys(rows, slot_K, c_C, r_R, C, R, R_POW2, ROW, FP8, GROUP)
        score_HK = tl.dot(query_HC, tl.trans(latent_KC))
        score_HK = tl.dot(query_HR, tl.trans(rotated_KR), score_HK) * scale
        score_HK = tl.where(seen_K[None, :], score_HK, float("-inf"))
        new_H = tl.maximum(most_H, tl.max(score_HK, 1))
        base_H = tl.where(new_H == float("-inf"), 0.0, new_H)  # nothing seen yet
        share_HK = tl.exp2(score_HK - base_H[:, None])
        shrink_H = tl.exp2(most_H - base_H)
        total_H = total_H * shrink_H + tl.sum(share_HK, 1)
        mixed_HC = mixed_HC * shrink_H[:, None]
        # What is not seen may be another's, and a NaN.
        latent_KC = tl.where(seen_K[:, None], latent_KC, tl.zeros_like(latent_KC))
        mixed_HC = tl.dot(share_HK.to(tl.bfloat16), latent_KC, mixed_HC)
        most_H = new_H
    place_H = (token * tl.num_programs(2) + tl.program_id(2)) * H + h_H
    tl.store(most + place_H, most_H, inside_H)
    tl.store(total + place_H, total_H, inside_H)
    tl.store(mixed + place_H.to(tl.int64)[:, None] * C + c_C[None, :], mixed_HC, inside_H[:, None])


@triton.jit
def _keys(
    rows, slot_K, c_C, r_R, C: tl.constexpr, R: tl.constexpr, R_POW2: tl.constexpr,
    ROW: tl.constexpr, FP8: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Latents [K, C] and rotated keys [K, R] of slots, bfloat16; rows take ROW elements each."""
    row_K1 = rows + (slot_K * ROW)[:, None]
    if not FP8:
        latent_KC = tl.load(row_K1 + c_C[None, :])
        rotated_K1 = row_K1 + C
    else:
        groups: tl.constexpr = C // GROUP
        code_KC = tl.load(row_K1 + c_C[None, :]).to(tl.int32)
        scale_K1 = (row_K1 + C).to(tl.pointer_type(tl.float32))
        scale_KB = tl.load(scale_K1 + tl.arange(0, groups)[None, :])
        scale_KBG = tl.broadcast_to(scale_KB[:, :, None], (slot_K.shape[0], groups, GROUP))
        # E4M3 bits where float32 has them: the code times 2^-120, subnormals too.
        value_KC = ((code_KC & 0x80) << 24 | (code_KC & 0x7F) << 20).to(tl.float32, bitcast=True)
        value_KC = value_KC * 1.329227995784916e36 * tl.reshape(scale_KBG, value_KC.shape)
        latent_KC = value_KC.to(tl.bfloat16)
        rotated_K1 = (row_K1 + C + 4 * groups).to(tl.pointer_type(tl.bfloat16))
    if R == R_POW2:
        return latent_KC, tl.load(rotated_K1 + r_R[None, :])
    return latent_KC, tl.load(rotated_K1 + r_R[None, :], (r_R < R)[None, :], 0.0)


@triton.jit(do_not_specialize=["num_parts"])
def _merge(
    mixed, most, total, out, num_parts, H: tl.constexpr, C: tl.constexpr, L_POW2: tl.constexpr
):
    """out [T, H, C]: the parts of each, by the weight of their largest score."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    l_L = tl.arange(0, L_POW2)
    inside_L = l_L < num_parts
    place_L = (token * num_parts + l_L) * H + head
    most_L = tl.load(most + place_L, inside_L, float("-inf"))
    weight_L = tl.exp2(most_L - tl.max(most_L, 0))
    total = tl.sum(weight_L * tl.load(total + place_L, inside_L, 0.0), 0)
    c_C = tl.arange(0, C)
    place_LC = place_L.to(tl.int64)[:, None] * C + c_C[None, :]
    mixed_LC = tl.load(mixed + place_LC, inside_L[:, None], 0.0)
    mixed_C = tl.sum(mixed_LC * weight_L[:, None], 0) / total
    tl.store(out + (token * H + head) * C + c_C, mixed_C.to(tl.bfloat16))
