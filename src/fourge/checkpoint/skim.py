"""The sizes of a checkpoint's tensors, without parsing what there are a hundred thousand of.

GLM-5.1 in NVFP4 has 232,670 tensors, all but 1 % of them parts of routed experts; parsing and
checking their headers takes seconds. ``skim`` steps over the decoder layers' routed experts inside
the text of each header and takes their bytes as what is left of the shard: 0.1 s. It notices
missing and truncated shards; the contents are the doctor's business. Imports no torch.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from fourge.checkpoint.header import (
    DTYPE_BYTES,
    INDEX_NAME,
    MAX_HEADER_BYTES,
    SINGLE_NAME,
    read_header,
)
from fourge.errors import CheckpointError

_SHARD_NAME = re.compile(rb'"([^"/\\]+\.safetensors)"')
_NUMBERED = re.compile(r"(.+)-\d+-of-(\d+)\.safetensors")

# In the first shard that has routed experts, and in every so many, their dtypes are looked for.
SAMPLED = 16


@dataclass(frozen=True, slots=True)
class Skimmed:
    """``sizes``: tensor -> bytes, without the decoder layers' routed experts, whose tensors have
    ``expert_bytes`` together and the dtypes ``expert_dtypes``.
    """

    sizes: dict[str, int]
    dtypes: dict[str, str]
    expert_bytes: int
    expert_dtypes: frozenset[str]


def skim(folder: Path, num_layers: int) -> Skimmed:
    """Skim the shards of ``folder``, a model of ``num_layers`` decoder layers.

    Raises CheckpointError where a shard is missing, truncated or not a safetensors file.
    """
    later = "|".join(str(num_layers + extra) for extra in range(8))  # MTP layers
    experts = re.compile(
        rf'(?:"model\.layers\.(?!(?:{later})\.)\d+\.mlp\.experts\.[^}}]*\}}\s*,?\s*)+'.encode()
    )
    sizes: dict[str, int] = {}
    dtypes: dict[str, str] = {}
    expert_bytes = 0
    expert_dtypes: set[str] = set()
    for number, path in enumerate(_shards(folder)):
        header, data_bytes = _read(path)
        if b"[0,%d]" % data_bytes not in header and b",%d]" % data_bytes not in header:
            read_header(path)  # says what is wrong, or that spaces are written otherwise
        others = _parse(path, experts.sub(b"", header))
        own = data_bytes - sum(nbytes for _, nbytes in others.values())
        if own and (not expert_bytes or number % SAMPLED == 0):
            expert_dtypes |= _dtypes(b"".join(run[0] for run in experts.finditer(header)))
        for name, (dtype, nbytes) in others.items():
            sizes[name], dtypes[name] = nbytes, dtype
        expert_bytes += own
    return Skimmed(sizes, dtypes, expert_bytes, frozenset(expert_dtypes))


def _shards(folder: Path) -> list[Path]:
    """The shards, all of them there."""
    names = _expected(folder)
    if not names:
        raise CheckpointError(
            f"{folder} holds neither {INDEX_NAME} nor {SINGLE_NAME}; give the folder of a"
            " checkpoint in safetensors form."
        )
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(names)} shards are missing in {folder}, {missing[0]} first:"
            " download them again."
        )
    return [folder / name for name in sorted(names)]


def _expected(folder: Path) -> set[str]:
    """Names of the shards: a numbered one tells of the others, else the index does (20 MB)."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return {SINGLE_NAME} if (folder / SINGLE_NAME).is_file() else set()
    found = {path.name for path in folder.glob("*.safetensors")}
    numbered = [match for name in sorted(found) if (match := _NUMBERED.fullmatch(name))]
    if numbered and len(numbered) == len(found):
        stem, count = numbered[0][1], numbered[0][2]
        return {
            f"{stem}-{n:0{len(count)}d}-of-{count}.safetensors" for n in range(1, int(count) + 1)
        }
    return {name.decode() for name in _SHARD_NAME.findall(index.read_bytes())}


def _read(path: Path) -> tuple[bytes, int]:
    """A shard's header and the bytes of data that follow it."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path} ({size} bytes) is truncated or not a safetensors file: download it again."
            )
        return stream.read(length), size - 8 - length


def _parse(path: Path, header: bytes) -> dict[str, tuple[str, int]]:
    """Tensor -> dtype and bytes of a header from which members have been cut."""
    text = re.sub(rb",\s*\}\s*$", b"}", header.strip())
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        return {
            name: (entry["dtype"], entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has a malformed safetensors header ({error}).") from None


def _dtypes(run: bytes) -> set[str]:
    """The dtypes that occur in a text of header entries."""
    return {name for name in DTYPE_BYTES if b'"%s"' % name.encode() in run}
