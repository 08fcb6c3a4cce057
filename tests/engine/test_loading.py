"""NVFP4 and BF16 checkpoints, the ways to hold experts, and what an FP8 cache costs."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from engine_models import SMALL, greedy, outputs, random_tokens, serve, write_model
from fourge.engine import loader
from fourge.engine.cache import token_bytes
from fourge.engine.engine import Engine
from fourge.engine.params import SamplingParams
from fourge.errors import CheckpointError
from fourge.formats.nvfp4 import NVFP4Tensor, dequantize
from fourge.models.config import from_dict
from fourge_process import run
from random_checkpoint import published_config, write_input_ids
from tensor_edits import edit_tensors

PROMPTS = [random_tokens(length, length) for length in (5, 40, 150)]


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    data = write_input_ids(folder / "data.jsonl", sequences=8, length=64, vocab=256)
    done = run("quantize", model, folder / "out", "--method", "max", "--data", data)
    assert done.status == 0, done.stderr
    return folder / "out"


def read_tensor(folder: Path, name: str) -> torch.Tensor:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118
                return file.get_tensor(name)
    raise AssertionError(name)


def test_expanded_experts_are_what_the_format_says(quantized: Path) -> None:
    engine = Engine(quantized, **SMALL)
    assert engine.experts == "expanded"
    layer = engine._runner._weights.layers[1]
    for name, rows in (("gate_proj", slice(0, 32)), ("up_proj", slice(32, 64))):
        stem = f"model.layers.1.mlp.experts.4.{name}"
        packed = NVFP4Tensor(
            *(read_tensor(quantized, f"{stem}.{part}") for part in NVFP4Tensor._fields)
        )
        assert torch.equal(layer["mlp.experts.gate_up_proj"][4, rows], dequantize(packed))


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_cache_of_expanded_experts_changes_no_token(
    quantized: Path, monkeypatch: pytest.MonkeyPatch, drafts: int
) -> None:
    roomy = Engine(quantized, **SMALL, num_speculative_tokens=drafts)
    expected = serve(roomy, PROMPTS, greedy(logprobs=0))

    monkeypatch.setattr(loader, "expanded_bytes", lambda *_: 1 << 60)

    monkeypatch.setattr(
        loader.Loader, "_room", lambda self, _: loader.ExpandedExperts(4, torch.float32)
    )
    narrow = Engine(quantized, **SMALL, num_speculative_tokens=drafts)
    assert narrow.experts == "cached"
    found = serve(narrow, PROMPTS, greedy(logprobs=0))
    assert outputs(found) == outputs(expected)
    for mine, theirs in zip(found, expected, strict=True):
        pairs = zip(mine.logprobs, theirs.logprobs, strict=True)
        assert max(abs(a.logprob - b.logprob) for a, b in pairs) < 1e-4
    kept = narrow._runner._weights.layers[1]._kept
    assert len(kept._kept) == 4
    assert kept.hits > 0


def test_bf16_arithmetic_stays_close_to_float32(tiny_glm: Path) -> None:
    prompt = random_tokens(150, 1, 2000)
    found = {}
    for dtype in ("float32", "bfloat16"):
        engine = Engine(tiny_glm, **SMALL, dtype=dtype, num_speculative_tokens=1)
        (request,) = serve(engine, [prompt], greedy(prompt_logprobs=0))
        known = [one.logprob for one in request.prompt_logprobs if one is not None]
        found[engine.sizes.cache_kind] = torch.tensor(known)
    assert set(found) == {"fp32", "bf16"}
    assert 0 < (found["fp32"] - found["bf16"]).abs().mean() < 0.1


def test_progress_counts_every_byte_once(quantized: Path) -> None:
    told: list[tuple[int, int]] = []
    Engine(quantized, **SMALL, on_progress=lambda done, total: told.append((done, total)))
    done = [one for one, _ in told]
    assert done == sorted(done)
    assert told[-1][0] == told[-1][1]


def test_damaged_weights_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    name = "model.layers.1.self_attn.o_proj.weight"
    edit_tensors(folder, name, lambda tensor: tensor.fill_(torch.nan))
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN"):
        Engine(folder, **SMALL)


def test_bytes_of_a_token_are_those_of_the_published_layouts() -> None:
    """GLM-5.1 with its MTP layer: 79 x 788 bytes in FP8."""
    config = from_dict(
        published_config(
            num_hidden_layers=78, first_k_dense_replace=3, kv_lora_rank=512, qk_rope_head_dim=64,
            qk_nope_head_dim=192, v_head_dim=256, hidden_size=6144, index_head_dim=128,
        )
    )  # fmt: skip
    hidden = 4 * 6144 // 64
    assert token_bytes(config, "fp8", mtp=True) == 79 * 788 + hidden
    assert token_bytes(config, "bf16", mtp=False) == 78 * 2 * (576 + 128)


def test_what_a_smaller_cache_costs_is_small_and_fp8_costs_more(
    tiny_glm: Path, tmp_path: Path
) -> None:
    """KL to the float32 cache of the model's own text of four times index_topk."""
    base = Engine(tiny_glm, **SMALL)
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=250, ignore_eos=True)
    text = serve(base, [[2029, 2031, 2033]], params)[0].tokens

    def logprobs(kind: str) -> torch.Tensor:
        engine = Engine(tiny_glm, **SMALL, kv_cache_dtype=kind, max_num_batched_tokens=96)
        hidden: list[torch.Tensor] = []
        request = engine.add("one", text, greedy(max_tokens=1, prompt_logprobs=0))
        target = engine._runner.target
        engine._runner.target = lambda *step: hidden.append(target(*step)) or hidden[-1]
        while engine.has_work:
            engine.step()
        assert request.num_output == 1
        return engine._runner.logits(torch.cat(hidden)).log_softmax(-1)

    exact = logprobs("fp32")
    costs = {
        kind: torch.nn.functional.kl_div(
            logprobs(kind), exact, log_target=True, reduction="batchmean"
        ).item()
        for kind in ("fp32", "bf16", "fp8")
    }
    assert costs["fp32"] == 0
    assert 0 < costs["bf16"] < 1e-3
    assert costs["bf16"] < costs["fp8"] < 2e-2
