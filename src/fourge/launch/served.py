"""What is to be served: a checkpoint as its headers and config show it, in the figures of a plan.

Bytes are told apart by what tensor parallelism does with them: routed experts and most matrices are
cut into parts, norms, routers, indexers and the down projections of the latents lie on every GPU
(vllm 0.33.0 deepseek_v2.py, sglang 0.5.23 deepseek_v2.py). Reads headers and small files only.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourge.checkpoint.metadata import HF_QUANT_CONFIG_NAME, read_config
from fourge.checkpoint.names import Role, find
from fourge.checkpoint.skim import Skimmed, skim
from fourge.errors import CheckpointError, LaunchError
from fourge.models.config import ModelConfig, from_dict

GENERATION_CONFIG_NAME = "generation_config.json"
_REPLICATED_ROLES = frozenset({Role.NORM, Role.FINAL_NORM, Role.ROUTER, Role.INDEXER, Role.MTP})
_REPLICATED_ATTENTION = ("q_a_proj", "kv_a_proj_with_mqa", "layernorm", "inv_freq")
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of the decoder, or of its MTP layer: experts and other parts that are cut, the rest."""

    experts: int = 0
    sharded: int = 0
    replicated: int = 0

    @property
    def total(self) -> int:
        return self.experts + self.sharded + self.replicated


@dataclass(frozen=True, slots=True)
class Served:
    """A checkpoint to serve. ``experts`` and ``mtp_experts`` are "nvfp4", "fp8" or "bf16"."""

    folder: Path
    config: ModelConfig
    raw: dict[str, Any]
    weights: Weights
    mtp_weights: Weights
    experts: str
    mtp_experts: str
    sampling: dict[str, float]

    @property
    def has_mtp(self) -> bool:
        return self.mtp_weights.total > 0

    @property
    def is_nvfp4(self) -> bool:
        return self.experts == "nvfp4"


def look_at(folder: Path) -> Served:
    """Read config and headers. Raises CheckpointError, ConfigError or LaunchError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; give the folder of a checkpoint (a repository of a hub has"
            " to be downloaded first)."
        )
    _, raw = read_config(folder)
    config = from_dict(raw)
    skimmed = skim(folder, config.num_hidden_layers)
    weights, mtp_weights = _weigh(skimmed, config)
    mtp_dtypes = {
        dtype
        for name, dtype in skimmed.dtypes.items()
        if ".mlp.experts." in name and name.split(".")[2] in map(str, config.mtp_layers)
    }
    return Served(
        folder=folder,
        config=config,
        raw=raw,
        weights=weights,
        mtp_weights=mtp_weights,
        experts=_kind(skimmed.expert_dtypes, _algorithm(folder, raw)),
        mtp_experts=_kind(mtp_dtypes, _algorithm(folder, raw)),
        sampling=_sampling(folder),
    )


def _weigh(skimmed: Skimmed, config: ModelConfig) -> tuple[Weights, Weights]:
    """Bytes of the decoder and of the MTP layers."""
    sums = {False: [skimmed.expert_bytes, 0, 0], True: [0, 0, 0]}
    for name, nbytes in skimmed.sizes.items():
        # A scale goes where its matrix goes.
        parsed = find(name) or find(name.rpartition(".")[0] + ".weight")
        is_mtp = parsed is not None and parsed.layer in config.mtp_layers
        if parsed is None:
            part = 2
        elif parsed.role == Role.ROUTED_EXPERT:
            part = 0
        elif parsed.role in _REPLICATED_ROLES or any(
            word in parsed.suffix for word in _REPLICATED_ATTENTION
        ):
            part = 2
        else:
            part = 1
        sums[is_mtp][part] += nbytes
    return Weights(*sums[False]), Weights(*sums[True])


def _algorithm(folder: Path, raw: Mapping[str, Any]) -> str:
    """The name of the quantization, in capitals; "" without one."""
    block = raw.get("quantization_config") or raw.get("compression_config")
    if block is None and (folder / HF_QUANT_CONFIG_NAME).is_file():
        try:
            document = json.loads((folder / HF_QUANT_CONFIG_NAME).read_bytes())
            block = document["quantization"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder / HF_QUANT_CONFIG_NAME} is not a ModelOpt document ({error!r})."
            ) from None
    if not isinstance(block, dict):
        return ""
    return str(block.get("quant_algo") or block.get("quant_method") or "").upper()


def _kind(dtypes: frozenset[str] | set[str], algorithm: str) -> str:
    if "U8" in dtypes and "NVFP4" in algorithm:
        return "nvfp4"
    if "U8" in dtypes or "I32" in dtypes:
        raise LaunchError(
            f"the routed experts are packed, but config.json names the quantization"
            f" {algorithm or 'none'}; fourge launches NVFP4, FP8 and BF16 checkpoints: let"
            " fourge doctor look at the metadata."
        )
    return "fp8" if "F8_E4M3" in dtypes else "bf16"


def _sampling(folder: Path) -> dict[str, float]:
    """What generation_config.json proposes for sampling."""
    try:
        document = json.loads((folder / GENERATION_CONFIG_NAME).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / GENERATION_CONFIG_NAME}: {error}.") from None
    return {
        key: document[key]
        for key in SAMPLING_KEYS
        if isinstance(document.get(key), int | float) and not isinstance(document[key], bool)
    }
