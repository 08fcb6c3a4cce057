"""The index and the safetensors headers of a checkpoint, read without loading any tensor.

Format: 8 bytes little-endian header length, a JSON header with ``dtype``, ``shape`` and
``data_offsets`` per tensor, then the data without holes (huggingface/safetensors, README "Format").
``read_checkpoint`` validates everything that headers can tell: missing and truncated shards,
holes, duplicates, and an index that disagrees with its shards. Imports no torch.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fourge.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# Bytes per element of every dtype that safetensors 0.8 defines and whose elements are whole bytes.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

# The safetensors library refuses longer headers (SAFETENSORS_MAX_HEADER_LEN).
MAX_HEADER_BYTES = 100_000_000

# Where tensors share one buffer, each begins at a multiple of this: a cache line, and more than
# any element size.
ALIGNMENT = 64


class TensorInfo(NamedTuple):
    """Where a tensor lies: ``nbytes`` bytes from byte ``start`` of ``file`` on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """The headers of all shards; ``shards`` maps a file's name to its size in bytes."""

    folder: Path
    tensors: dict[str, TensorInfo]
    shards: dict[str, int]


def check_folder(folder: Path) -> None:
    """CheckpointError: there is none."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of a checkpoint.")


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and validate all headers of the checkpoint in ``folder``.

    Raises CheckpointError where folder, index or a shard is missing, truncated or contradictory.
    """
    folder = Path(folder)
    check_folder(folder)
    weight_map = _read_weight_map(folder)
    shards: dict[str, int] = {}
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        path = folder / file
        if not path.is_file():
            count = sum(shard == file for shard in weight_map.values())
            raise CheckpointError(
                f"shard {path} is missing; {count} tensors should be in it: download it again."
            )
        shards[file] = path.stat().st_size
        for info in read_header(path):
            if info.name in tensors:
                raise CheckpointError(
                    f"tensor {info.name} is in two shards, {tensors[info.name].file} and {file};"
                    " engines would load either: remove one."
                )
            tensors[info.name] = info
    _compare_with_index(folder, weight_map, tensors)
    return Checkpoint(folder, tensors, shards)


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, in the order of their data.

    Raises CheckpointError if the file is truncated or its header is malformed.
    """
    with path.open("rb") as stream:

        def read(start: int, count: int) -> bytes:
            stream.seek(start)
            return stream.read(count)

        return parse_header(str(path), path.stat().st_size, read)


def parse_header(place: str, size: int, read: Callable[[int, int], bytes]) -> list[TensorInfo]:
    """The same for a file of ``size`` bytes, wherever it lies; ``read(start, count)`` gives bytes.

    ``file`` of a tensor is the last part of ``place``.
    """
    length_bytes = read(0, min(8, size))
    length = int.from_bytes(length_bytes, "little")
    if len(length_bytes) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{place} ({size} bytes) is truncated or not a safetensors file: download it again."
        )
    try:
        header = json.loads(read(8, length))
        header.pop("__metadata__", None)
        file = place.rpartition("/")[2]
        infos = [_tensor_info(file, 8 + length, item) for item in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{place} has a malformed safetensors header ({error}).") from None
    infos.sort(key=lambda info: (info.start, info.nbytes))
    end = 8 + length
    for info in infos:
        if info.start != end:
            raise CheckpointError(f"{place}: the data of {info.name} overlaps or leaves a hole.")
        end += info.nbytes
    if end != size:
        raise CheckpointError(
            f"{place} has {size} bytes but its header describes {end}: it is truncated or has a"
            " garbage tail; download it again."
        )
    return infos


def aligned_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Bytes that tensors occupy side by side in one buffer, each aligned."""
    return sum(-(-info.nbytes // ALIGNMENT) * ALIGNMENT for info in tensors)


def _tensor_info(file: str, data_start: int, item: tuple[str, dict]) -> TensorInfo:
    name, entry = item
    begin, end = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(int(size) for size in entry["shape"])
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {name} has the unknown dtype {dtype}")
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(f"tensor {name}: {end - begin} bytes for {dtype} {list(shape)}")
    return TensorInfo(name, dtype, shape, file, data_start + begin, end - begin)


def _read_weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> shard file name, from the index or, without one, from the single file."""
    index_path, single_path = folder / INDEX_NAME, folder / SINGLE_NAME
    if index_path.is_file():
        try:
            weight_map = json.loads(index_path.read_bytes())["weight_map"]
            if not all(os.path.basename(file) == file for file in weight_map.values()):
                raise ValueError("a shard name leaves the folder")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index_path} is not a safetensors index ({error!r}).") from None
        _refuse_orphans(folder, set(weight_map.values()))
        return weight_map
    if single_path.is_file():
        _refuse_orphans(folder, {SINGLE_NAME})
        return {info.name: SINGLE_NAME for info in read_header(single_path)}
    raise CheckpointError(
        f"{folder} holds neither {INDEX_NAME} nor {SINGLE_NAME}; give the folder of a checkpoint"
        " in safetensors form."
    )


def _refuse_orphans(folder: Path, named: set[str]) -> None:
    """Engines load every *.safetensors of the folder, so a file that the index lacks is a trap."""
    orphans = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in named)
    if orphans:
        raise CheckpointError(
            f"{folder} holds {orphans[0]}{' and others' if orphans[1:] else ''}, which the index"
            " does not name: add its tensors to the index or remove the file."
        )


def _compare_with_index(
    folder: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]
) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(
                f"{folder / INDEX_NAME} places {name} in {file}, which lacks it: rebuild the index."
            )
    for name, info in tensors.items():
        if name not in weight_map:
            raise CheckpointError(
                f"{info.file} holds {name}, which {INDEX_NAME} does not name: rebuild the index."
            )
