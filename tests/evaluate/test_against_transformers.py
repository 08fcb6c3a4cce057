"""The same figures from an independent computation: transformers' model with expanded weights.

Nothing of fourge's forward pass, number format or KL takes part in the expected values. The NVFP4
arithmetic is written out again from the format's definition, in numpy.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from fourge_process import run

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([MAGNITUDES, -MAGNITUDES])
WINDOW, NUM_WINDOWS = 160, 6  # index_topk of the example model is 64
# Between two orders of the same sums. Rounding inputs to 4 bits amplifies the last bit of a sum
# that lies between two codes: on one processor 1.2e-4 of a mean KL of 0.032, where the lanes are
# 0.0125 apart.
TOLERANCE = {"w4a16": 1e-4, "w4a4": 5e-4}


class Stored:
    """The tensors of a checkpoint, by name."""

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        self._folder, self._map = folder, index["weight_map"]

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._folder / self._map[name], framework="pt") as file:
            return file.get_tensor(name)

    def expand(self, stem: str) -> torch.Tensor:
        """code x block scale x tensor scale, of an expert's projection."""
        packed = self[f"{stem}.weight"].numpy()
        codes = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
        scales = (
            self[f"{stem}.weight_scale"].view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
        )
        scales = scales.astype(np.float32) * self[f"{stem}.weight_scale_2"].numpy()
        return torch.from_numpy(VALUES[codes] * np.repeat(scales, 16, axis=-1))


def round_inputs(x: torch.Tensor, input_scale: float) -> torch.Tensor:
    """NVFP4 as an engine rounds activations: a block scale of E4M3 for the moment, then E2M1."""
    blocks = x.numpy().astype(np.float32).reshape(len(x), -1, 16)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(6 * input_scale)
    scale = np.minimum(scale, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    divisor = scale * np.float32(input_scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(divisor > 0, blocks / divisor, 0)
    rounded = scaled.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)  # nearest, ties to even
    return torch.from_numpy((rounded * divisor).reshape(x.shape))


@pytest.fixture(scope="module")
def data(tiny_glm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of token ids, cut from the model's own kind of text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tiny_glm))
    conversations = (tiny_glm.parent / "conversations" / "coding.jsonl").read_text().splitlines()
    text = "\n".join(
        str(message["content"])
        for line in conversations
        for message in json.loads(line)["messages"]
        if message.get("content")
    )
    ids = tokenizer(text, verbose=False)["input_ids"]
    path = tmp_path_factory.mktemp("data") / "windows.jsonl"
    rows = [ids[number * WINDOW : (number + 1) * WINDOW] for number in range(NUM_WINDOWS)]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def checkpoint(tiny_glm: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "tiny-glm-NVFP4"
    done = run("quantize", tiny_glm, out, "--method", "max", "--data", data)
    assert done.status == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def document(tiny_glm: Path, checkpoint: Path, data: Path) -> dict[str, Any]:
    done = run("evaluate", checkpoint, "--reference", tiny_glm, "--data", data, "--json")
    assert done.status == 0, done.stderr
    return json.loads(done.stdout)


def load_model(folder: Path) -> Any:
    """transformers' model in float32; its two latent norms get the configured eps, which
    transformers 5 ignores (it builds them with 1e-6).
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    for layer in model.model.layers:
        layer.self_attn.q_a_layernorm.variance_epsilon = model.config.rms_norm_eps
        layer.self_attn.kv_a_layernorm.variance_epsilon = model.config.rms_norm_eps
    return model.eval().requires_grad_(False)


def expand_experts(model: Any, stored: Stored) -> None:
    for number, layer in enumerate(model.model.layers):
        experts = getattr(layer.mlp, "experts", None)
        if experts is None:
            continue
        for expert in range(len(experts.down_proj)):
            stem = f"model.layers.{number}.mlp.experts.{expert}."
            gate, up = stored.expand(stem + "gate_proj"), stored.expand(stem + "up_proj")
            experts.gate_up_proj.data[expert] = torch.cat([gate, up])
            experts.down_proj.data[expert] = stored.expand(stem + "down_proj")


class RoundingExperts(torch.nn.Module):
    """transformers' experts, with their inputs rounded to NVFP4; one scale for the layer."""

    def __init__(self, experts: Any, gate_up_scale: float, down_scale: float) -> None:
        super().__init__()
        self.experts, self.gate_up_scale, self.down_scale = experts, gate_up_scale, down_scale

    def forward(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for expert in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == expert)
            x = round_inputs(hidden[token], self.gate_up_scale)
            gate, up = (x @ self.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            inner = round_inputs(torch.nn.functional.silu(gate) * up, self.down_scale)
            y = inner @ self.experts.down_proj[expert].T
            out.index_add_(0, token, y * top_k_weights[token, place, None])
        return out


def round_experts(model: Any, stored: Stored) -> None:
    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            stem = f"model.layers.{number}.mlp.experts.0."
            gate_up, down = (
                float(stored[f"{stem}{name}.input_scale"]) for name in ("gate_proj", "down_proj")
            )
            layer.mlp.experts = RoundingExperts(layer.mlp.experts, gate_up, down)


def log_probabilities(model: Any, data: Path) -> torch.Tensor:
    """[windows, WINDOW, vocabulary], float64."""
    rows = [json.loads(line)["input_ids"] for line in data.read_text().splitlines()]
    logits = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows]
    return torch.stack(logits).double().log_softmax(-1)


@pytest.mark.parametrize("lane", ["w4a16", "w4a4"])
def test_figures_equal_those_of_transformers(
    lane: str, document: dict[str, Any], tiny_glm: Path, checkpoint: Path, data: Path
):
    stored = Stored(checkpoint)
    model = load_model(tiny_glm)
    reference = log_probabilities(model, data)
    expand_experts(model, stored)
    if lane == "w4a4":
        round_experts(model, stored)
    candidate = log_probabilities(model, data)

    kl = (reference.exp() * (reference - candidate)).sum(-1)[:, :-1]
    rows = torch.tensor([json.loads(line)["input_ids"] for line in data.read_text().splitlines()])
    found = document["lanes"][lane]
    assert found["tokens"] == NUM_WINDOWS * (WINDOW - 1)
    assert kl.mean() > 0.005
    near = {"abs": TOLERANCE[lane]}
    assert found["kl_mean"] == pytest.approx(float(kl.mean()), **near)
    assert found["kl_median"] == pytest.approx(float(kl.flatten().quantile(0.5)), **near)
    beyond = kl[:, 64:]
    assert found["beyond_topk"]["tokens"] == beyond.numel()
    assert found["beyond_topk"]["kl_mean"] == pytest.approx(float(beyond.mean()), **near)
    for name, of in (("ppl_reference", reference), ("ppl_candidate", candidate)):
        nll = -of[:, :-1].gather(-1, rows[:, 1:, None]).mean()
        assert found[name] == pytest.approx(float(nll.exp()), rel=TOLERANCE[lane])
    agreement = (reference.argmax(-1) == candidate.argmax(-1))[:, :-1].double().mean()
    assert found["top1"] == pytest.approx(float(agreement), abs=2e-3)


def test_equal_arithmetic_has_no_floor(document: dict[str, Any]):
    """On the CPU the candidates compute in float32 as the reference does, in the same order."""
    assert document["receipt"]["arithmetic"] == {"reference": "float32", "candidate": "float32"}
    assert document["floor"]["kl_max"] == 0
    assert document["floor"]["top1"] == 1
