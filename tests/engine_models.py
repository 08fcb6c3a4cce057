"""Tiny random models for engines, and how tests run requests through one."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fourge.checkpoint.names import parse
from fourge.engine.engine import Engine
from fourge.engine.params import SamplingParams
from fourge.engine.request import Request
from fourge.formats import nvfp4
from fourge.models.config import DSA_FAMILIES
from random_checkpoint import published_config, write_checkpoint
from tensor_edits import INDEX

VOCAB = 256
# The engine's smallest sensible sizes, so that tests start quickly.
SMALL = {"cache_tokens": 4096, "device": "cpu"}


def write_model(folder: Path, *, family: str = "glm_moe_dsa", **changes: Any) -> Path:
    """A random model of three layers whose index_topk is 32; no traps, since those are for packing.

    With few index heads many positions would score exactly 0, and which of them are selected would
    be anybody's choice.
    """
    indexer = {"index_n_heads": 16} if family in DSA_FAMILIES else {}
    config = published_config(family, **({"eos_token_id": None} | indexer | changes))
    return write_checkpoint(folder, config=config, traps=False)


def pack_experts(source: Path, folder: Path, chosen: Callable[[int, int], bool]) -> Path:
    """A copy whose routed experts are NVFP4 where ``chosen(layer, expert)``; no two weights share
    a scale.
    """
    shutil.copytree(source, folder)
    path = folder / INDEX
    index = json.loads(path.read_text())
    for file in sorted(set(index["weight_map"].values())):
        packed: dict[str, torch.Tensor] = {}
        for name, weight in load_file(folder / file).items():
            parsed = parse(name)
            layer, expert = parsed.layer, parsed.expert
            if layer is None or expert is None or not chosen(layer, expert):
                packed[name] = weight
                continue
            parts = nvfp4.quantize(weight, nvfp4.weight_scale_2(nvfp4.amax(weight)))
            for part, value in zip(("", "_scale", "_scale_2"), parts, strict=True):
                packed[name + part] = value
        save_file(packed, folder / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(packed, file)
    path.write_text(json.dumps(index))
    return folder


def random_tokens(length: int, seed: int, vocab: int = VOCAB) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (length,), generator=generator).tolist()


def greedy(**changes: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | changes))


def serve(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[Any]
) -> list[Request]:
    """All prompts at once, to the end."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    requests = [
        engine.add(f"{id(prompts)}-{number}", prompt, one)
        for number, (prompt, one) in enumerate(zip(prompts, each, strict=True))
    ]
    while engine.has_work:
        engine.step()
    return requests


def outputs(requests: Sequence[Request]) -> list[list[int]]:
    return [request.output for request in requests]
