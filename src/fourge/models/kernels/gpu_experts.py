"""All routed experts of a layer in two Triton kernels, over NVFP4 weights as they are stored.

Slots (a token's choice of an expert) are sorted by expert and cut into tiles of one expert each;
a program multiplies some weight rows by a tile's inputs. Codes become BF16 in registers: a code's
bits, put where BF16 has them, are the code times 2^-126, and its product with a block scale times
2^118 has at most six significant bits, so nothing is rounded. weight_scale_2 and the 2^8 that is
left multiply the float32 sum. More exact than a weight rounded to BF16, as moe.run_experts has it.

Weights are read in words of eight codes, and inputs lie as [8, rows, K/8], those of every word's
first code first: so a word's codes never change places.
Suffixes: S slots, T slots of a tile, E experts, N weight rows, K inputs of a row, W = K/8 words,
B = K/16 block scales.
"""

# Triton may not be installed; where it is, its types are those of its compiler, not of kernels.
# pyright: reportMissingImports=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl

from fourge.formats.nvfp4 import NVFP4Tensor

WORD_CODES = 8
# Of the weights, per step of a program; the best of some thirty on an H200.
TILE_ROWS, TILE_WORDS = 128, 32
# Slots of a tile: the least that tl.dot takes while experts get few tokens each.
FEW_SLOTS, MANY_SLOTS = 16, 64


def run_experts(
    x_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    gates_TK: torch.Tensor,
    gate_up: NVFP4Tensor,
    down: NVFP4Tensor,
) -> torch.Tensor:
    """What all experts add to every token, float32 [T, D], summed in the order of its choices.

    x_TD: bfloat16. gate_up: codes [E, 2N, D/2], block scales [E, 2N, D/16], weight_scale_2 [E, 2];
    down: [E, D, N/2], [E, D, N/16], [E]. Does not wait for the device.
    """
    num_tokens, size = x_TD.shape
    num_experts, inner = len(down.weight), gate_up.weight.shape[1] // 2
    num_choices = experts_TK.shape[1]
    num_slots = num_tokens * num_choices
    expert_S, order_S = experts_TK.flatten().sort(stable=True)
    every_E = torch.arange(num_experts, device=x_TD.device)
    end_E = torch.searchsorted(expert_S, every_E, right=True, out_int32=True)
    tile = FEW_SLOTS if num_slots <= FEW_SLOTS * num_experts else MANY_SLOTS
    num_tiles = min(num_slots, num_experts) + num_slots // tile  # at most
    inner_8SW = x_TD.new_empty(WORD_CODES, num_slots, inner // WORD_CODES)
    out_SD = x_TD.new_empty(num_slots, size)
    x_8TW = x_TD.unflatten(1, (-1, WORD_CODES)).permute(2, 0, 1).contiguous()
    shape = {"E": num_experts, "E_POW2": triton.next_power_of_2(num_experts), "TILE_T": tile}
    shape |= {"TILE_N": TILE_ROWS, "TILE_W": TILE_WORDS, "num_warps": 4}
    shape["num_stages"] = 3 if tile == FEW_SLOTS else 2
    with torch.cuda.device_of(x_TD):
        _gate_up[(num_tiles, triton.cdiv(inner, TILE_ROWS))](
            x_8TW, order_S, end_E, *_words(gate_up), inner_8SW, num_tokens, num_slots,
            CHOICES=num_choices, N=inner, W=size // WORD_CODES, **shape,
        )  # fmt: skip
        _down[(num_tiles, triton.cdiv(size, TILE_ROWS))](
            inner_8SW, order_S, gates_TK, end_E, *_words(down), out_SD, num_slots,
            N=size, W=inner // WORD_CODES, **shape,
        )  # fmt: skip
    return out_SD.view(num_tokens, num_choices, size).sum(1, dtype=torch.float32)


def _words(stack: NVFP4Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        stack.weight.view(torch.int32),
        stack.weight_scale.view(torch.uint8),
        stack.weight_scale_2,
    )


_NEGATIVE = 0x80008000  # signs of a pair of numbers; as a pair -0, which an addition leaves alone


def _expand() -> str:
    """PTX: words $8 $9, bytes of block scales $10 $11 -> values $0 to $7, pairs of BF16."""
    lines = [
        ".reg .b32 s, t, u, z;",
        f"mov.b32 z, {_NEGATIVE:#x};",
        # E4M3 bits where BF16 has them: the scale times 2^-120, subnormals too.
        "prmt.b32 s, $10, $11, 0x5410;",
        "shl.b32 s, s, 4;",
        "mov.b32 t, 0x7F007F00;",  # 2^127
        "fma.rn.bf16x2 s, s, t, z;",
        "mov.b32 t, 0x77007700;",  # 2^111
        "fma.rn.bf16x2 s, s, t, z;",
    ]
    for first, halves in ((0, 0x5410), (4, 0x7632)):
        lines.append(f"prmt.b32 t, $8, $9, {halves:#x};")
        for place in (3, 2, 1, 0):
            lines += [
                "and.b32 u, t, 0x70007000;",
                "shr.b32 u, u, 6;",
                "lop3.b32 u, t, z, u, 0xEA;",  # t & z | u
                f"fma.rn.bf16x2 ${first + place}, u, s, z;",
            ]
            if place:
                lines.append("shl.b32 t, t, 4;")
    return "{" + "\n".join(lines) + "}"


EXPAND = tl.constexpr(_expand())
LEFT = tl.constexpr(256.0)  # 2^126 / 2^118


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def _gate_up(
    x, order_S, end_E, words, scales, scale_2, out, num_tokens, num_slots,
    E: tl.constexpr, CHOICES: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    E_POW2: tl.constexpr, TILE_T: tl.constexpr, TILE_N: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """out [8, S, N/8] = silu(gate x) * (up x); words [E, 2N, W], gate rows before up rows."""
    expert, first, stop = _tile(end_E, tl.program_id(0), E, E_POW2, TILE_T)
    if first == stop:
        return
    slot_T = first + tl.arange(0, TILE_T)
    inside_T = slot_T < stop
    row_T = tl.load(order_S + slot_T, mask=inside_T, other=0) // CHOICES
    n_N = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    gate_N = expert * 2 * N + tl.minimum(n_N, N - 1)
    gate_NT = tl.zeros((TILE_N, TILE_T), tl.float32)
    up_NT = tl.zeros((TILE_N, TILE_T), tl.float32)
    for w in range(0, W, TILE_W):
        x0, x1, x2, x3, x4, x5, x6, x7 = _inputs(x, row_T, w, num_tokens, W, TILE_W)
        v0, v1, v2, v3, v4, v5, v6, v7 = _weights(words, scales, gate_N, w, W, TILE_W)
        gate_NT = tl.dot(v0, x0, gate_NT)
        gate_NT = tl.dot(v1, x1, gate_NT)
        gate_NT = tl.dot(v2, x2, gate_NT)
        gate_NT = tl.dot(v3, x3, gate_NT)
        gate_NT = tl.dot(v4, x4, gate_NT)
        gate_NT = tl.dot(v5, x5, gate_NT)
        gate_NT = tl.dot(v6, x6, gate_NT)
        gate_NT = tl.dot(v7, x7, gate_NT)
        v0, v1, v2, v3, v4, v5, v6, v7 = _weights(words, scales, gate_N + N, w, W, TILE_W)
        up_NT = tl.dot(v0, x0, up_NT)
        up_NT = tl.dot(v1, x1, up_NT)
        up_NT = tl.dot(v2, x2, up_NT)
        up_NT = tl.dot(v3, x3, up_NT)
        up_NT = tl.dot(v4, x4, up_NT)
        up_NT = tl.dot(v5, x5, up_NT)
        up_NT = tl.dot(v6, x6, up_NT)
        up_NT = tl.dot(v7, x7, up_NT)
    gate_NT *= tl.load(scale_2 + 2 * expert) * LEFT
    up_NT *= tl.load(scale_2 + 2 * expert + 1) * LEFT
    inner_NT = (gate_NT * tl.sigmoid(gate_NT) * up_NT).to(tl.bfloat16)
    place_NT = ((n_N % 8) * num_slots)[:, None] + slot_T[None, :]
    place_NT = place_NT.to(tl.int64) * (N // 8) + (n_N // 8)[:, None]
    tl.store(out + place_NT, inner_NT, mask=(n_N < N)[:, None] & inside_T[None, :])


@triton.jit(do_not_specialize=["num_slots"])
def _down(
    x, order_S, gate_S, end_E, words, scales, scale_2, out, num_slots,
    E: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    E_POW2: tl.constexpr, TILE_T: tl.constexpr, TILE_N: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """out [S, N] = gate * down x, slots in their own order; x [8, S, W] in the experts' order."""
    expert, first, stop = _tile(end_E, tl.program_id(0), E, E_POW2, TILE_T)
    if first == stop:
        return
    sorted_T = first + tl.arange(0, TILE_T)
    inside_T = sorted_T < stop
    row_T = tl.minimum(sorted_T, num_slots - 1)
    n_N = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    down_N = expert * N + tl.minimum(n_N, N - 1)
    out_NT = tl.zeros((TILE_N, TILE_T), tl.float32)
    for w in range(0, W, TILE_W):
        x0, x1, x2, x3, x4, x5, x6, x7 = _inputs(x, row_T, w, num_slots, W, TILE_W)
        v0, v1, v2, v3, v4, v5, v6, v7 = _weights(words, scales, down_N, w, W, TILE_W)
        out_NT = tl.dot(v0, x0, out_NT)
        out_NT = tl.dot(v1, x1, out_NT)
        out_NT = tl.dot(v2, x2, out_NT)
        out_NT = tl.dot(v3, x3, out_NT)
        out_NT = tl.dot(v4, x4, out_NT)
        out_NT = tl.dot(v5, x5, out_NT)
        out_NT = tl.dot(v6, x6, out_NT)
        out_NT = tl.dot(v7, x7, out_NT)
    slot_T = tl.load(order_S + sorted_T, mask=inside_T, other=0)
    gate_T = tl.load(gate_S + slot_T, mask=inside_T, other=0.0)
    out_NT *= (gate_T * (tl.load(scale_2 + expert) * LEFT))[None, :]
    place_NT = slot_T.to(tl.int64)[None, :] * N + n_N[:, None]
    mask_NT = (n_N < N)[:, None] & inside_T[None, :]
    tl.store(out + place_NT, out_NT.to(tl.bfloat16), mask=mask_NT)


@triton.jit
def _tile(end_E, tile, E: tl.constexpr, E_POW2: tl.constexpr, TILE_T: tl.constexpr):
    """Expert, first slot and end of a tile; no slots for a tile beyond the last."""
    e_E = tl.arange(0, E_POW2)
    end = tl.load(end_E + e_E, mask=e_E < E, other=0)
    begin = tl.load(end_E + e_E - 1, mask=(e_E > 0) & (e_E < E), other=0)
    tiles = (end - begin + TILE_T - 1) // TILE_T
    until = tl.cumsum(tiles, 0)
    before = tile - (until - tiles)
    own = (before >= 0) & (tile < until)
    expert = tl.sum(tl.where(own, e_E, 0), 0).to(tl.int64)
    first = tl.sum(tl.where(own, begin + before * TILE_T, 0), 0)
    stop = tl.sum(tl.where(own, end, 0), 0)
    return expert, first, tl.minimum(stop, first + TILE_T)


@triton.jit
def _inputs(x, row_T, w, num_rows, W: tl.constexpr, TILE_W: tl.constexpr):
    """Inputs [TILE_W, T] of the words' first codes, second codes, ..; zeros beyond the last."""
    w_W = w + tl.arange(0, TILE_W)
    x_ptrs = x + (row_T.to(tl.int64)[None, :] * W + w_W[:, None])
    step = num_rows.to(tl.int64) * W
    x0 = _load(x_ptrs, (w_W < W)[:, None], W, TILE_W)
    x1 = _load(x_ptrs + step, (w_W < W)[:, None], W, TILE_W)
    x2 = _load(x_ptrs + 2 * step, (w_W < W)[:, None], W, TILE_W)
    x3 = _load(x_ptrs + 3 * step, (w_W < W)[:, None], W, TILE_W)
    x4 = _load(x_ptrs + 4 * step, (w_W < W)[:, None], W, TILE_W)
    x5 = _load(x_ptrs + 5 * step, (w_W < W)[:, None], W, TILE_W)
    x6 = _load(x_ptrs + 6 * step, (w_W < W)[:, None], W, TILE_W)
    x7 = _load(x_ptrs + 7 * step, (w_W < W)[:, None], W, TILE_W)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _weights(words, scales, row_N, w, W: tl.constexpr, TILE_W: tl.constexpr):
    """Weights [N, TILE_W] of the words' first codes, second codes, .., bfloat16, times 2^-8."""
    w_W = w + tl.arange(0, TILE_W)
    b_B = w // 2 + tl.arange(0, TILE_W // 2)
    word_ptrs = words + row_N[:, None] * W + w_W[None, :]
    scale_ptrs = scales + row_N[:, None] * (W // 2) + b_B[None, :]
    word_NW = _load(word_ptrs, (w_W < W)[None, :], W, TILE_W)
    scale_NB = _load(scale_ptrs, (b_B < W // 2)[None, :], W, TILE_W)
    scale_NB2 = tl.broadcast_to(scale_NB[:, :, None], (scale_NB.shape[0], TILE_W // 2, 2))
    scale_NW = tl.reshape(scale_NB2, word_NW.shape).to(tl.int32)
    b16 = tl.bfloat16
    return tl.inline_asm_elementwise(
        EXPAND, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r", [word_NW, scale_NW],
        dtype=(b16, b16, b16, b16, b16, b16, b16, b16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _load(ptrs, mask, W: tl.constexpr, TILE_W: tl.constexpr):
    """Zeros where the last tile of a row is not full."""
    if W % TILE_W == 0:
        return tl.load(ptrs)
    return tl.load(ptrs, mask, 0)
