"""Quantized random checkpoints, and two models to compare with: fourge's own, and transformers'
own with the expanded weights.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fourge.transformers  # noqa: F401  registers the quantizer
from checkpoint_edits import Folder
from fourge.formats import nvfp4
from fourge.models import layer as ours
from fourge.models.linear import linear
from fourge.models.norm import rms_norm
from fourge.models.survey import survey_quantized
from fourge.models.tensors import expected_tensors
from fourge_process import run
from random_checkpoint import FAMILIES, published_config, write_checkpoint, write_input_ids

VOCABULARY = 256
# index_topk is 32 where there is sparse attention.
VARIANTS = {
    **{family: published_config(family) for family in FAMILIES},
    "shared indexers": published_config(
        num_hidden_layers=5, index_topk_freq=2, index_skip_topk_offset=2
    ),
    "queries without a latent": published_config("glm4_moe_lite", q_lora_rank=None),
    "expert groups": published_config("deepseek_v3", n_group=3, topk_group=2),
    "tied embeddings, no MTP layer": published_config(
        tie_word_embeddings=True, num_nextn_predict_layers=0
    ),
}

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small take ten times as long where threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The quantized checkpoint of a variant, made once; nobody may change it."""
    made: dict[str, Path] = {}

    def make(variant: str = "glm_moe_dsa") -> Path:
        if variant not in made:
            folder = tmp_path_factory.mktemp("quantized")
            source = write_checkpoint(folder / "source", config=VARIANTS[variant], traps=False)
            data = write_input_ids(folder / "ids.jsonl", sequences=3, length=48, vocab=VOCABULARY)
            done = run("quantize", source, folder / "made", "--method", "max", "--data", data)
            assert done.status == 0, done.stderr
            made[variant] = folder / "made"
        return made[variant]

    return make


@pytest.fixture(scope="session", params=VARIANTS)
def any_checkpoint(request: pytest.FixtureRequest, checkpoint_of: Callable[..., Path]) -> Path:
    return checkpoint_of(request.param)


@pytest.fixture
def checkpoint(checkpoint_of: Callable[..., Path]) -> Path:
    return checkpoint_of()


@pytest.fixture
def own(checkpoint: Path, tmp_path: Path) -> Folder:
    """The same to be changed."""
    return Folder(shutil.copytree(checkpoint, tmp_path / "own"))


@pytest.fixture(scope="session")
def load() -> Callable[..., Any]:
    """AutoModelForCausalLM.from_pretrained, in float32 unless told otherwise."""

    def load(folder: Path, **options: Any) -> Any:
        options = {"dtype": torch.float32} | options
        return transformers.AutoModelForCausalLM.from_pretrained(str(folder), **options)

    return load


@pytest.fixture(scope="session")
def tokens() -> Callable[..., torch.Tensor]:
    """Random token ids [1, length]."""

    def draw(length: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, VOCABULARY, (1, length), generator=generator)

    return draw


@pytest.fixture(scope="session")
def expand() -> Callable[[Path, Path], Path]:
    """Write the decoder with its experts expanded to float32, as no quantized model at all."""

    def write(checkpoint: Path, folder: Path) -> Path:
        config, stored = survey_quantized(checkpoint).config, all_tensors(checkpoint)
        tensors: Tensors = {}
        for name in expected_tensors(config, mtp=False):
            tensors[name] = stored[name]
            if stored[name].dtype == torch.uint8:
                scale, scale_2 = stored[f"{name}_scale"], stored[f"{name}_scale_2"]
                packed = nvfp4.NVFP4Tensor(stored[name], scale, scale_2.reshape(()))
                tensors[name] = nvfp4.dequantize(packed)
        raw = json.loads((checkpoint / "config.json").read_text())
        raw.pop("quantization_config", None)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(raw))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return write


@pytest.fixture(scope="session")
def logits_of_fourge() -> Callable[[Path, Sequence[torch.Tensor]], list[torch.Tensor]]:
    """[length, vocabulary] of every sequence, from the layers that fourge evaluate runs (w4a16)."""

    def compute(checkpoint: Path, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        config, tensors = survey_quantized(checkpoint).config, all_tensors(checkpoint)
        lengths = [sequence.numel() for sequence in sequences]
        rope = ours.rope_table(config, max(lengths), "cpu")
        ids = torch.cat([sequence.flatten() for sequence in sequences])
        hidden_TD, topk = tensors["model.embed_tokens.weight"][ids].float(), None
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            weights = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            hidden_TD, topk = ours.decoder_layer(
                hidden_TD, lengths, weights, config, layer, rope, topk
            )
        hidden_TD = rms_norm(hidden_TD, tensors["model.norm.weight"], config.rms_norm_eps)
        head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        return list(linear(hidden_TD, tensors[f"{head}.weight"]).split(lengths))

    return compute


def all_tensors(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors
