"""The fast way of decode steps against the reference, in every step of real requests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine_models import SMALL, greedy, outputs, random_tokens, serve, write_model
from fourge.engine import decoding
from fourge.engine.engine import Engine
from fourge.models.kernels import decode as kernels

# float32 summed in another order; the largest difference seen is 7e-6.
TOLERANCE = 2e-5
LENGTHS = (1, 5, 31, 40, 100, 200)  # index_topk is 32
CASES: dict[str, dict[str, Any]] = {
    "every layer selects": {},
    "shared selections": {"indexer_types": ["full", "shared", "full"]},
    "groups of experts": {"n_group": 3, "topk_group": 2},
    "no shared experts": {"n_shared_experts": 0},
    "gates not normed": {"norm_topk_prob": False},
    "halves rotated": {"rope_interleave": False, "indexer_rope_interleave": False},
    "no indexer": {"family": "deepseek_v3"},
    "no indexer, other family": {"family": "glm4_moe_lite"},
    "no query latent": {"family": "deepseek_v3", "q_lora_rank": None},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("drafts", [0, 2])
def test_every_step_is_that_of_the_reference(case: str, drafts: int, tmp_path: Path) -> None:
    engine = Engine(write_model(tmp_path, **CASES[case]), **SMALL, num_speculative_tokens=drafts)
    errors = compare_steps(engine)
    serve(engine, [random_tokens(length, length) for length in LENGTHS], greedy())
    assert len(errors) >= 4 * 12 / (drafts + 1)
    assert max(errors) < TOLERANCE


def compare_steps(engine: Engine) -> list[float]:
    """From now on every fast step is done by the reference first; the largest differences of
    hidden states, and of what lies in the cache.
    """
    runner, errors = engine._runner, []
    decoder = runner._decoder
    assert decoder is not None
    fast = decoder.run

    def both(
        hidden_TD: torch.Tensor, parts: Sequence[Any], layers: range, *, first: int, **again: Any
    ) -> tuple[torch.Tensor, Any]:
        rows = [array for layer in layers for array in decoder._layers[layer][1]]
        step = runner._step(parts, first=first)
        expected_TD, _ = runner._reference(hidden_TD.clone(), step, layers)
        written = [array.copy() for array in rows]
        found_TD, selection = fast(hidden_TD, parts, layers, first=first, **again)
        errors.append((found_TD - expected_TD).abs().max().item())
        errors.extend(
            float(np.abs(found[64:] - one[64:]).max(initial=0.0))
            for found, one in zip(rows, written, strict=True)
        )
        return found_TD, selection

    decoder.run = both  # type: ignore[method-assign]
    return errors


@pytest.mark.parametrize(
    "options", [{"kv_cache_dtype": "bf16"}, {"kv_cache_dtype": "fp8"}, {"dtype": "bfloat16"}]
)
def test_other_number_formats_go_the_way_of_the_reference(
    options: dict[str, str], model: Path
) -> None:
    engine = Engine(model, **SMALL, **options)
    assert engine._runner._decoder is None
    assert len(outputs(serve(engine, [random_tokens(40, 1)], greedy()))[0]) == 12


def test_odd_sizes_go_the_way_of_the_reference(tmp_path: Path) -> None:
    engine = Engine(write_model(tmp_path, v_head_dim=30), **SMALL)
    assert engine._runner._decoder is None


def test_prompts_beside_decoding_requests_change_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [random_tokens(length, length) for length in (150, 20, 90, 3)]
    fast = Engine(model, **SMALL, max_num_batched_tokens=48)
    with monkeypatch.context() as patch:
        patch.setattr("fourge.engine.runner.can_decode", lambda *_: False)
        slow = Engine(model, **SMALL, max_num_batched_tokens=48)
    assert isinstance(fast._runner._decoder, decoding.Decoder)
    assert slow._runner._decoder is None
    assert outputs(serve(fast, prompts, greedy())) == outputs(serve(slow, prompts, greedy()))


@pytest.mark.parametrize("distinct", [3, 40, 1 << 32])
def test_largest_are_those_of_a_sort(distinct: int) -> None:
    choose = np.random.default_rng(distinct)
    for count in (65, 100, 1000, 4000):
        bits = choose.integers(0, distinct, count).astype(np.uint32)
        chosen = np.full(64, -1)
        kernels._largest(bits, count, 64, np.empty(count, np.int64), chosen)
        assert len(set(chosen.tolist())) == 64
        assert (np.sort(bits[chosen]) == np.sort(bits)[-64:]).all()


def test_exponential() -> None:
    x = np.concatenate([np.linspace(-87, 88, 5001), np.linspace(-1, 1, 5001)]).astype(np.float32)
    found = np.array([kernels._exp(one) for one in x])
    assert np.abs(found / np.exp(x.astype(np.float64)) - 1).max() < 2 * 2**-23
    assert np.isnan(kernels._exp(np.float32(np.nan)))
    assert 0 <= kernels._exp(np.float32(-np.inf)) < 1e-37


def test_decode_steps_use_one_thread_and_prompts_all(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    engine = Engine(model, **SMALL)
    target, seen = engine._runner.target, []

    def note(chunks: Sequence[Any], newest: Any) -> torch.Tensor:
        seen.append((max(one.num_tokens for one in chunks) > 1, torch.get_num_threads()))
        return target(chunks, newest)

    monkeypatch.setattr(engine._runner, "target", note)
    serve(engine, [random_tokens(40, 1)], greedy(max_tokens=3))
    assert seen == [(True, 2), (False, 1), (False, 1)]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
