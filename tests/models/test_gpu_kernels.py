"""Experts, attention and indexer in Triton against the readable formulas in float32."""

from collections.abc import Iterator

import pytest
import torch

from fourge.checkpoint.names import FUSED_DOWN, FUSED_GATE_UP, expert_suffix
from fourge.formats import cache_rows
from fourge.models import dsa, mla
from fourge.models.moe import Routed, run_experts, run_fused_experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Weights = dict[str, torch.Tensor]
# BF16 results, and one BF16 rounding on the way; the norm of the difference of a row.
TOLERANCE = 6e-3


@pytest.fixture(autouse=True)
def exact_references() -> Iterator[None]:
    """No TF32 in the float32 references."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def row_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error of a row; NaN never passes a comparison."""
    found, expected = found.double().flatten(1), expected.double().flatten(1)
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


def random_experts(
    count: int, hidden: int, inner: int, seed: int, scale_bytes: tuple[int, int] = (40, 80)
) -> tuple[Weights, Weights]:
    """Random codes and scales: as a checkpoint has them, and stacked."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def bytes_(low: int, high: int, *shape: int) -> torch.Tensor:
        kind = {"device": "cuda", "dtype": torch.uint8, "generator": generator}
        return torch.randint(low, high, shape, **kind)

    def stack(name: str, rows: int, columns: int, scalars: tuple[int, ...]) -> Weights:
        scale = bytes_(*scale_bytes, count, rows, columns // 16).view(torch.float8_e4m3fn)
        scale_2 = torch.rand(count, *scalars, device="cuda", generator=generator) + 0.5
        size = scale.float().square().mean().sqrt() * 3 * columns**0.5
        return {
            name: bytes_(0, 256, count, rows, columns // 2),
            f"{name}_scale": scale,
            f"{name}_scale_2": scale_2 / size,
        }

    stacked = stack(FUSED_GATE_UP, 2 * inner, hidden, (2,)) | stack(FUSED_DOWN, hidden, inner, ())
    single: Weights = {}
    for expert in range(count):
        for number, name in enumerate(("gate_proj", "up_proj")):
            rows = slice(number * inner, (number + 1) * inner)
            for part in ("", "_scale"):
                one = stacked[FUSED_GATE_UP + part][expert, rows]
                single[expert_suffix(expert, name, f"weight{part}")] = one
            scalar = stacked[f"{FUSED_GATE_UP}_scale_2"][expert, number]
            single[expert_suffix(expert, name, "weight_scale_2")] = scalar
        for part in ("", "_scale", "_scale_2"):
            one = stacked[FUSED_DOWN + part][expert]
            single[expert_suffix(expert, "down_proj", f"weight{part}")] = one
    return single, stacked


def random_routing(tokens: int, experts: int, choices: int, hidden: int, seed: int) -> Routed:
    generator = torch.Generator("cuda").manual_seed(seed)
    kind = {"device": "cuda", "generator": generator}
    x_TD = torch.randn(tokens, hidden, **kind).bfloat16()
    experts_TK = torch.rand(tokens, experts, **kind).topk(choices).indices
    gates_TK = torch.rand(tokens, choices, **kind) + 0.1
    return Routed(x_TD, experts_TK, gates_TK, torch.zeros(tokens, hidden, device="cuda"))


# Tokens, experts, choices, hidden, intermediate: one token, rows of no full tile, experts that
# nobody chose, tiles of many slots, and as many experts as GLM-5.1 has.
SHAPES = [
    (1, 6, 2, 64, 32),
    (7, 5, 3, 80, 48),
    (33, 40, 4, 512, 272),
    (1, 256, 8, 1024, 512),
    (64, 256, 8, 512, 256),
    (700, 8, 2, 256, 112),
    (900, 1, 1, 64, 64),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_experts_are_those_one_by_one(shape: tuple[int, int, int, int, int]) -> None:
    tokens, experts, choices, hidden, inner = shape
    single, stacked = random_experts(experts, hidden, inner, seed=tokens)
    routed = random_routing(tokens, experts, choices, hidden, seed=tokens + 1)
    exact = routed._replace(x_TD=routed.x_TD.float(), acc_TD=torch.ones_like(routed.acc_TD))
    run_experts(exact, single, range(experts))
    found = run_fused_experts(routed, stacked)
    assert found.dtype == torch.float32
    assert row_error(found, exact.acc_TD - 1) < TOLERANCE


@pytest.mark.parametrize("scale_bytes", [(1, 8), (1, 0x7F), (0x78, 0x7F)])
def test_block_scales_of_every_size_are_read_right(scale_bytes: tuple[int, int]) -> None:
    """Subnormal ones, all together, and the largest."""
    single, stacked = random_experts(4, 256, 128, seed=3, scale_bytes=scale_bytes)
    routed = random_routing(20, 4, 2, 256, seed=4)
    exact = routed._replace(x_TD=routed.x_TD.float(), acc_TD=routed.acc_TD.clone())
    run_experts(exact, single, range(4))
    assert row_error(run_fused_experts(routed, stacked), exact.acc_TD) < TOLERANCE


def test_a_token_does_not_see_its_company() -> None:
    _, stacked = random_experts(16, 256, 128, seed=5)
    routed = random_routing(24, 16, 4, 256, seed=6)
    together = run_fused_experts(routed, stacked)
    for token in range(24):
        alone = Routed(*(one[token : token + 1] for one in routed))
        assert torch.equal(run_fused_experts(alone, stacked)[0], together[token])


# Queries, heads, latent, rotated, chosen rows.
ATTENTION = [
    (1, 4, 32, 8, 1),
    (5, 20, 32, 8, 33),
    (3, 16, 128, 16, 200),
    (1, 64, 512, 64, 2048),
    (32, 64, 512, 64, 2048),
    (9, 64, 512, 64, 70),
]


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("shape", ATTENTION)
def test_attention_in_place_is_that_over_copied_rows(
    shape: tuple[int, int, int, int, int],
    large: bool,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fourge.models.kernels import gpu_attention

    if not large:
        monkeypatch.setattr(gpu_attention, "LARGE", gpu_attention.SMALL)
    tokens, heads, latent, rotated, chosen = shape
    generator = torch.Generator("cuda").manual_seed(tokens)
    keys = {"device": "cuda", "generator": generator}
    num_slots = chosen + 500
    values = torch.randn(num_slots, latent + rotated, **keys).bfloat16()
    rows = values
    if kind == "fp8":
        rows = cache_rows.pack_latents(values[:, :latent], values[:, latent:])
        values = cache_rows.unpack_latents(rows, latent, rotated)
    assert gpu_attention.can_attend(rows, latent)
    query_THX = torch.randn(tokens, heads, latent + rotated, **keys).bfloat16()
    slot_TK = torch.rand(tokens, num_slots, **keys).topk(chosen).indices
    seen_TK = torch.rand(tokens, chosen, **keys) < 0.7
    seen_TK[:, chosen // 2] = True
    seen_TK[0] = torch.arange(chosen, device="cuda") == chosen - 1
    found = gpu_attention.attend_rows(query_THX, rows, slot_TK, seen_TK, 0.08, latent)
    key_TKX = values.float()[slot_TK]
    expected = mla.mix(query_THX.float(), key_TKX, seen_TK.unsqueeze(1), 0.08, latent)
    assert found.dtype == torch.bfloat16
    assert row_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(("heads", "size"), [(3, 16), (32, 128)])
def test_scores_in_place_are_those_over_copied_keys(
    heads: int, size: int, first: int, kind: str
) -> None:
    from fourge.models.kernels import gpu_index

    generator = torch.Generator("cuda").manual_seed(heads)
    keys = {"device": "cuda", "generator": generator}
    values = torch.randn(40, 64, size, **keys).bfloat16().float()
    pages = values.bfloat16().mT.flatten(1)
    if kind == "fp8":
        codes, scales = cache_rows.pack_index_keys(values)
        pages = torch.cat([codes.flatten(1), scales.flatten(1)], 1)
        values = cache_rows.unpack_index_pages(pages, size)
    assert gpu_index.can_score(pages, size)
    page_MP = torch.rand(5, 40, **keys).topk(7).indices
    position_MN = torch.tensor([[0, 1], [62, 63], [64, 65], [300, 301], [440, 441]]).cuda()
    num_keys = 442
    query_MNHI = torch.randn(5, 2, heads, size, **keys).bfloat16().float()
    weight_MNH = torch.randn(5, 2, heads, **keys)
    found = gpu_index.score_pages(
        query_MNHI, weight_MNH, pages, page_MP, position_MN, num_keys, first
    )
    key_MSI = values[page_MP].flatten(1, 2)[:, first : first + num_keys]
    expected = dsa.score_cached(query_MNHI, dsa.IndexInput(key_MSI, weight_MNH), position_MN)
    assert torch.equal(found == -torch.inf, expected == -torch.inf)
    assert (found == -torch.inf).sum() == 10 * num_keys - (position_MN + 1).sum()
    seen = expected > -torch.inf
    assert row_error(found[seen][None], expected[seen][None]) < 1e-5


def test_caches_that_the_kernel_cannot_read_are_left_to_torch() -> None:
    from fourge.models.kernels import gpu_attention

    assert not gpu_attention.can_attend(torch.zeros(4, 576, device="cuda"), 512)
    assert not gpu_attention.can_attend(torch.zeros(4, 576, dtype=torch.bfloat16), 512)
    rows = torch.zeros(4, 560, dtype=torch.bfloat16, device="cuda")
    assert not gpu_attention.can_attend(rows, 496)
