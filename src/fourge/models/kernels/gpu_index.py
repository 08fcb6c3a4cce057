"""The indexer's scores of few queries over a paged cache, in one Triton kernel.

dsa.score_cached without a float32 copy of all keys: a program takes one query and one page, which
it reads where it lies. Keys are BF16, number after number [I, L], or the FP8 pages [L, I] of
formats/cache_rows.py, whose scales are powers of two; queries come from a BF16 product. So products
of BF16 with float32 sums lose nothing.

Suffixes: M sequences, N queries of each, H index heads, I index head size, P pages of a sequence,
S positions, L tokens of a page.
"""

# Triton may not be installed; where it is, its types are those of its compiler, not of kernels.
# pyright: reportMissingImports=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl

from fourge.formats.cache_rows import PAGE_TOKENS


def can_score(pages: torch.Tensor, size: int) -> bool:
    """Whether ``score_pages`` takes these."""
    whole = size == triton.next_power_of_2(size) and size >= 16
    return pages.is_cuda and pages.dtype in (torch.bfloat16, torch.uint8) and whole


def score_pages(
    query_MNHI: torch.Tensor, weight_MNH: torch.Tensor, pages: torch.Tensor,
    page_MP: torch.Tensor, position_MN: torch.Tensor, num_keys: int, first: int,
) -> torch.Tensor:  # fmt: skip
    """As dsa.score_cached over the keys of ``page_MP``, of which position 0 is number ``first``,
    for queries whose numbers are those of bfloat16: [M, N, S]. Does not wait for the device.
    """
    count, per_row, heads, size = query_MNHI.shape
    score_MNS = query_MNHI.new_empty(count, per_row, num_keys, dtype=torch.float32)
    with torch.cuda.device_of(pages):
        _score[(count * per_row, page_MP.shape[1])](
            query_MNHI.to(torch.bfloat16).contiguous(), weight_MNH.contiguous(), pages,
            page_MP.contiguous(), position_MN.contiguous(), score_MNS,
            per_row, page_MP.shape[1], num_keys, first,
            H=heads, H_POW2=max(16, triton.next_power_of_2(heads)), SIZE=size,
            L=PAGE_TOKENS, PAGE=pages.shape[1], FP8=pages.dtype == torch.uint8, num_warps=4,
        )  # fmt: skip
    return score_MNS


@triton.jit(do_not_specialize=["per_row", "num_pages", "num_keys", "first"])
def _score(
    query, weight, pages, table, positions, score, per_row, num_pages, num_keys, first,
    H: tl.constexpr, H_POW2: tl.constexpr, SIZE: tl.constexpr, L: tl.constexpr,
    PAGE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    page = tl.program_id(1)
    place_L = page * L + tl.arange(0, L) - first
    inside_L = (place_L >= 0) & (place_L < num_keys)
    score_L = tl.full((L,), float("-inf"), tl.float32)
    position = tl.load(positions + token)
    if page * L - first <= position:
        h_H = tl.arange(0, H_POW2)
        i_I = tl.arange(0, SIZE)
        inside_H = h_H < H
        query_HI = tl.load(
            query + (token * H + h_H)[:, None] * SIZE + i_I[None, :], inside_H[:, None], 0.0
        )
        own = pages + tl.load(table + token // per_row * num_pages + page) * PAGE
        j_L = tl.arange(0, L)
        if FP8:
            key_LI = tl.load(own + j_L[:, None] * SIZE + i_I[None, :])
            # E4M3 bits where float32 has them: the code times 2^-120, subnormals too.
            bits_LI = key_LI.to(tl.int32)
            bits_LI = (bits_LI & 0x80) << 24 | (bits_LI & 0x7F) << 20
            scale_L = tl.load((own + L * SIZE).to(tl.pointer_type(tl.float32)) + j_L)
            value_LI = bits_LI.to(tl.float32, bitcast=True) * 1.329227995784916e36
            key_LI = (value_LI * scale_L[:, None]).to(tl.bfloat16)
        else:
            key_LI = tl.load(own + j_L[:, None] + i_I[None, :] * L)
        product_HL = tl.maximum(tl.dot(query_HI, tl.trans(key_LI)), 0.0)
        weight_H = tl.load(weight + token * H + h_H, inside_H, 0.0)
        sum_L = tl.sum(product_HL * weight_H[:, None], 0)
        score_L = tl.where(place_L <= position, sum_L, score_L)
    tl.store(score + token * num_keys + place_L, score_L, inside_L)
