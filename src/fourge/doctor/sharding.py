"""Which shard of a repaired checkpoint each tensor lies in, and its index. Imports no torch.

A tensor keeps its file; one that was lost goes where the index had it, else beside its module, its
expert, its layer; what is left gets shards of its own.
"""

import json
from collections.abc import Mapping

from fourge.checkpoint.header import INDEX_NAME, SINGLE_NAME
from fourge.doctor.evidence import Evidence
from fourge.doctor.files import LocalFiles
from fourge.doctor.rewriting import Copy, Output

SHARD_BYTES = 5 << 30
ADDED = "model-added-{number:05d}.safetensors"

Index = tuple[str, bytes | None]  # name of the file, its new bytes; None: as it is


def place_tensors(
    evidence: Evidence, outputs: Mapping[str, Output]
) -> tuple[dict[str, list[Output]], dict[str, LocalFiles], Index | None]:
    """Tensors by shard, the shards that stay as they are, and the index if there must be one."""
    shards: dict[str, list[Output]] = {}
    nowhere: list[Output] = []
    beside: dict[str, str] | None = None
    for name, output in outputs.items():
        own = evidence.tensors.get(name)
        file = own.file if own is not None else _indexed(evidence, name)
        if file is None:
            beside = _files_of_modules(evidence) if beside is None else beside
            file = next((beside[one] for one in _modules(name) if one in beside), None)
        if file is None:
            nowhere.append(output)
        else:
            shards.setdefault(file, []).append(output)
    number, room = 0, 0
    for output in nowhere:
        if output.tensor.nbytes > room:
            number, room = number + 1, SHARD_BYTES
        shards.setdefault(ADDED.format(number=number), []).append(output)
        room -= output.tensor.nbytes
    whole = {
        file: evidence.files
        for file, own in shards.items()
        if isinstance(evidence.files, LocalFiles) and _stays(evidence, file, own)
    }
    return shards, whole, _index(evidence, shards)


def _indexed(evidence: Evidence, name: str) -> str | None:
    file = (evidence.index or {}).get(name)
    is_shard = file is not None and "/" not in file and file.endswith(".safetensors")
    return file if is_shard else None


def _modules(name: str) -> list[str]:
    """``model.layers.3.mlp.experts.0.up_proj``, ``...experts.0``, up to ``model.layers.3``."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 2, -1)]


def _files_of_modules(evidence: Evidence) -> dict[str, str]:
    return {
        module: info.file for name, info in evidence.tensors.items() for module in _modules(name)
    }


def _stays(evidence: Evidence, file: str, outputs: list[Output]) -> bool:
    """Whether a shard holds its own tensors and nothing else."""
    return len(outputs) == len(evidence.shards.get(file, ())) and all(
        isinstance(one.content, Copy)
        and one.content.files is evidence.files
        and one.content.info.file == file
        and one.content.info.name == one.tensor.name
        for one in outputs
    )


def _index(evidence: Evidence, shards: Mapping[str, list[Output]]) -> Index | None:
    if evidence.index is None and set(shards) == {SINGLE_NAME}:
        return None
    weight_map = {one.tensor.name: file for file, own in shards.items() for one in own}
    total = sum(one.tensor.nbytes for own in shards.values() for one in own)
    fits = weight_map == evidence.index and evidence.total_size in (None, total)
    if fits and evidence.index_problem is None:
        return INDEX_NAME, None
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return INDEX_NAME, (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
