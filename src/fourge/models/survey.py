"""The source as its headers show it: complete, BF16, of a known family, with experts to quantize.

``survey`` reads headers and small files only and refuses everything that would fail later. The
digests are what a resumed run compares. Imports no torch.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourge.checkpoint.header import TensorInfo, check_folder, read_checkpoint
from fourge.checkpoint.metadata import other_files, read_config, refuse_quantized
from fourge.checkpoint.names import split_fused
from fourge.errors import CheckpointError, ConfigError
from fourge.formats.layout import BLOCK_SIZE
from fourge.models import config as model_config
from fourge.models.tensors import check_quantized_tensors, check_tensors


@dataclass(frozen=True)
class Source:
    """A validated checkpoint; fused experts appear as the per-expert tensors inside them."""

    folder: Path
    config: model_config.ModelConfig
    config_text: str
    tensors: dict[str, TensorInfo]
    shards: dict[str, int]
    other_files: tuple[Path, ...]


def survey(folder: Path, *, mtp: str) -> Source:
    """Read the headers of a source and check that it is a complete BF16 model of a known family.

    Raises CheckpointError or ConfigError with what was found, needed, and what to do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of a BF16 checkpoint.")
    config_text, raw = read_config(folder)
    refuse_quantized(folder, raw)
    config = model_config.from_dict(raw)
    _check_experts(config)
    checkpoint = read_checkpoint(folder)
    tensors = split_fused(checkpoint.tensors)
    check_tensors(tensors, config, mtp=mtp == "bf16")
    return Source(
        folder, config, config_text, tensors, checkpoint.shards, tuple(other_files(folder))
    )


def survey_quantized(
    folder: Path, *, mtp: bool = False, overrides: Mapping[str, Any] | None = None
) -> Source:
    """The same for a checkpoint whose routed experts are NVFP4 in ModelOpt form; its MTP layer is
    looked at only with ``mtp``. A BF16 checkpoint passes too. ``overrides`` replace keys of
    config.json (models/config.py).
    """
    folder = Path(folder)
    check_folder(folder)
    config_text, raw = read_config(folder)
    config = model_config.from_dict(model_config.overridden(raw, overrides or {}))
    _check_experts(config)
    checkpoint = read_checkpoint(folder)
    tensors = split_fused(checkpoint.tensors)
    check_quantized_tensors(tensors, config, mtp=mtp)
    return Source(
        folder, config, config_text, tensors, checkpoint.shards, tuple(other_files(folder))
    )


def _check_experts(config: model_config.ModelConfig) -> None:
    """There must be experts, and blocks of 16 along the input of gate/up and of down."""
    if "sparse" not in config.mlp_types:
        raise ConfigError(
            "config.json describes only dense layers; fourge quantizes routed experts alone, so"
            " there is nothing to do: give a Mixture-of-Experts checkpoint."
        )
    for key in ("hidden_size", "moe_intermediate_size"):
        size = getattr(config, key)
        if size % BLOCK_SIZE:
            raise ConfigError(
                f"{key} is {size}; NVFP4 needs a multiple of {BLOCK_SIZE}: this model's experts"
                " cannot be NVFP4."
            )


def header_digest(source: Source) -> dict[str, str]:
    """Shard name -> sha256 over its size and header: what a resumed run compares."""
    digests = {}
    for file, size in source.shards.items():
        with (source.folder / file).open("rb") as stream:
            length = stream.read(8)
            header = stream.read(int.from_bytes(length, "little"))
        digests[file] = hashlib.sha256(f"{size}:".encode() + length + header).hexdigest()
    return digests


def config_digest(source: Source) -> str:
    """sha256 of the source's config.json."""
    return hashlib.sha256(source.config_text.encode()).hexdigest()


def file_digests(source: Source) -> dict[str, str]:
    """Relative path -> sha256 of the files that are copied (tokenizer, template, ...)."""
    digests = {}
    for path in source.other_files:
        with (source.folder / path).open("rb") as stream:
            digests[path.as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests
