"""What the rules look at, gathered once: files, headers, configs, small tensors.

Tolerant throughout: what cannot be read is remembered with its reason, and the rules go on with the
rest. Nothing larger than a header or a scalar is held.
"""

import codecs
import json
import math
import re
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from fourge.checkpoint.header import INDEX_NAME, TensorInfo, parse_header
from fourge.checkpoint.metadata import CONFIG_NAME, HF_QUANT_CONFIG_NAME
from fourge.checkpoint.names import TensorName, expert_name, find
from fourge.doctor.files import Files, read_tensors
from fourge.doctor.findings import shorten
from fourge.errors import CheckpointError
from fourge.models.config import ModelConfig

JsonObject = dict[str, Any]
MODEL_CARD = "README.md"
MOST_TEXT_BYTES = 4 << 20
SCALARS = ("weight_scale_2", "input_scale")
CORRECTION_BIAS = "e_score_correction_bias"
CONNECTIONS = 8  # at once, to a hub
PIECE_BYTES = 4 << 20
PIECES_REMOTE = 1
# What wrappers and libraries put before a published name.
WRAPPERS = re.compile(
    r"(?:_orig_mod\.|module\.|base_model\.model\.|(?:model\.)?language_model\.|model\.)+"
)


@dataclass(frozen=True)
class Projection:
    """One routed expert's projection on disk: its tensors by part ("weight", "input_scale", ..)."""

    layer: int
    expert: int
    name: str
    parts: Mapping[str, TensorInfo]

    @property
    def is_packed(self) -> bool:
        weight = self.parts.get("weight")
        return weight is not None and weight.dtype in ("U8", "I8")

    def tensor(self, part: str = "weight") -> str:
        return expert_name(self.layer, self.expert, self.name, part)


@dataclass
class Evidence:
    """Everything known of one checkpoint. ``config`` is None where it cannot be understood."""

    files: Files
    # Of a JSON file that some readers refuse, or read otherwise, there are both, it and a problem.
    index: dict[str, str] | None = None
    index_problem: str | None = None
    total_size: object = None  # what the index says
    shards: dict[str, list[TensorInfo]] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)  # shard -> why
    raw: JsonObject = field(default_factory=dict)
    raw_problem: str | None = None
    config: ModelConfig | None = None  # of ``corrected``
    # config.json with the values that its tensors speak for, where it has others.
    corrected: JsonObject = field(default_factory=dict)
    hf_quant: JsonObject | None = None
    hf_quant_problem: str | None = None
    source: "Evidence | None" = None
    _documents: dict[str, tuple[JsonObject | None, str | None]] = field(default_factory=dict)

    @cached_property
    def _stored(self) -> dict[str, TensorInfo]:
        """Every tensor of every shard; of copies, the one that the index names."""
        result: dict[str, TensorInfo] = {}
        for file, infos in self.shards.items():
            for info in infos:
                if info.name not in result or (self.index or {}).get(info.name) == file:
                    result[info.name] = info
        return result

    @cached_property
    def _parsed(self) -> dict[str, TensorName | None]:
        return {name: find(name) for name in self._stored}

    @cached_property
    def renamed(self) -> dict[str, str]:
        """Names with a wrapper's prefix, as stored -> the published names that are in them."""
        renamed = {}
        for name, parsed in self._parsed.items():
            published = unwrap(name) if parsed is None else None
            if published is not None and published not in self._stored:
                renamed[name] = published
        return renamed

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by its published name."""
        return {self.renamed.get(name, name): info for name, info in self._stored.items()}

    @cached_property
    def lost(self) -> set[str]:
        """Names that the index places in shards which are missing or damaged; K02 names those."""
        return {
            name
            for name, file in (self.index or {}).items()
            if file in self.damaged and name not in self.tensors
        }

    @property
    def is_unclear(self) -> bool:
        """Whether tensors are lost and no index tells which."""
        return bool(self.damaged) and self.index is None

    @cached_property
    def names(self) -> dict[str, TensorName | None]:
        """Each tensor's entry in the name table; None where there is none."""
        parsed = {self.renamed.get(name, name): one for name, one in self._parsed.items()}
        return parsed | {name: find(name) for name in self.renamed.values()}

    @cached_property
    def suffixes(self) -> dict[int, set[str]]:
        """layer -> what its tensors' names end in; of damaged shards, as the index has them."""
        layers: dict[int, set[str]] = {}
        for parsed in [*self.names.values(), *map(find, self.lost)]:
            if parsed is not None and parsed.layer is not None:
                layers.setdefault(parsed.layer, set()).add(parsed.suffix)
        return layers

    @cached_property
    def experts(self) -> dict[tuple[int, int, str], Projection]:
        """(layer, expert, projection) -> what there is of it."""
        parts: dict[tuple[int, int, str], dict[str, TensorInfo]] = {}
        for name, parsed in self.names.items():
            if parsed is not None and parsed.expert is not None:
                assert parsed.layer is not None
                assert parsed.projection is not None
                assert parsed.part is not None
                key = (parsed.layer, parsed.expert, parsed.projection)
                parts.setdefault(key, {})[parsed.part] = self.tensors[name]
        return {key: Projection(*key, own) for key, own in parts.items()}

    @cached_property
    def by_layer(self) -> dict[int, dict[int, dict[str, Projection]]]:
        """layer -> expert -> projection name -> Projection, in order."""
        layers: dict[int, dict[int, dict[str, Projection]]] = {}
        for (layer, expert, name), projection in sorted(self.experts.items()):
            layers.setdefault(layer, {}).setdefault(expert, {})[name] = projection
        return layers

    @cached_property
    def scalars(self) -> dict[str, float]:
        """The value of every float32 scalar of the experts."""
        wanted = [
            info
            for projection in self.experts.values()
            for part, info in projection.parts.items()
            if part in SCALARS and info.dtype == "F32" and info.nbytes == 4
        ]
        values = {}
        for info, data in read_tensors(self.files, wanted):
            values[info.name] = struct.unpack("<f", data)[0] if len(data) == 4 else math.nan
        return values

    def scalar(self, projection: Projection, part: str) -> float | None:
        """The value of a projection's scalar; None where there is none."""
        return self.scalars.get(projection.tensor(part))

    @property
    def quantization(self) -> JsonObject:
        """config.json's quantization_config, {} where there is none."""
        value = self.raw.get("quantization_config")
        return value if isinstance(value, dict) else {}

    @property
    def nested(self) -> JsonObject:
        """The "quantization" object of hf_quant_config.json, {} where there is none."""
        value = (self.hf_quant or {}).get("quantization")
        return value if isinstance(value, dict) else {}

    @cached_property
    def decoder_layers(self) -> range:
        count = self.config.num_hidden_layers if self.config else 0
        return range(count)

    @cached_property
    def mtp_tensors(self) -> dict[str, TensorInfo]:
        """Tensors of layers after the last decoder layer."""
        last = len(self.decoder_layers)
        return {
            name: self.tensors[name]
            for name, parsed in self.names.items()
            if parsed is not None and parsed.layer is not None and parsed.layer >= last
        }

    @cached_property
    def is_fitted_to_inputs(self) -> bool:
        """Whether fourge's record says that weights were fitted to what they are multiplied with:
        their own error is then not what was kept small.
        """
        method = (self.json_file("fourge/run.json") or {}).get("method")
        return isinstance(method, dict) and method.get("needs", "none") != "none"

    def quantized_layers(self) -> set[int]:
        """Layers with at least one packed expert projection."""
        return {key[0] for key, projection in self.experts.items() if projection.is_packed}

    def is_fp8_leftover(self, name: str) -> bool:
        """Whether a weight still has its FP8 block scales: K10 names it."""
        return f"{name}_scale_inv" in self.tensors

    def text(self, name: str) -> str:
        """A small file's text; empty where it is missing."""
        if name not in self.files.sizes:
            return ""
        size = min(self.files.sizes[name], MOST_TEXT_BYTES)
        return self.files.read(name, 0, size).decode("utf-8", errors="replace")

    def json_file(self, name: str) -> JsonObject | None:
        """The object in a JSON file; None where it is missing or not an object."""
        return self._read_json(name)[0]

    def json_problem(self, name: str) -> str | None:
        """Why no reader, or not every one, can use a JSON file; None where all can."""
        return self._read_json(name)[1]

    def _read_json(self, name: str) -> tuple[JsonObject | None, str | None]:
        if name not in self._documents:
            self._documents[name] = read_json(self.files, name)
        return self._documents[name]

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Content -> id of the tokens that tokenizer.json adds to its vocabulary."""
        tokenizer = self.json_file("tokenizer.json") or {}
        added = tokenizer.get("added_tokens") or []
        return {
            one["content"]: one["id"]
            for one in added
            if isinstance(one, dict) and "content" in one and "id" in one
        }


def gather(files: Files) -> Evidence:
    """Read headers and JSON files. CheckpointError if this is no checkpoint at all."""
    evidence = Evidence(files)
    shards = [name for name in files.sizes if name.endswith(".safetensors") and "/" not in name]
    if not shards and CONFIG_NAME not in files.sizes:
        raise CheckpointError(
            f"{files.place} holds neither {CONFIG_NAME} nor *.safetensors; give the folder of a"
            " checkpoint."
        )
    raw, evidence.raw_problem = read_json(files, CONFIG_NAME)
    evidence.raw = raw or {}
    evidence.hf_quant, evidence.hf_quant_problem = read_json(files, HF_QUANT_CONFIG_NAME)
    _read_index(evidence)
    with ThreadPoolExecutor(1 if files.is_local else CONNECTIONS) as pool:
        headers = pool.map(partial(_read_header, files), shards)
        for name, header in zip(shards, headers, strict=True):
            if isinstance(header, str):
                evidence.damaged[name] = header
            else:
                evidence.shards[name] = header
    for name in sorted(set((evidence.index or {}).values()) - set(files.sizes)):
        evidence.damaged[name] = f"{name} is named in the index and missing."
    return evidence


def same(evidence: Evidence, own: TensorInfo, theirs: TensorInfo) -> bool:
    """Whether two tensors hold the same bytes; of a hub's only the first piece is compared."""
    if (own.dtype, own.shape) != (theirs.dtype, theirs.shape):
        return False
    starts = range(0, own.nbytes, PIECE_BYTES)
    for begin in starts if evidence.files.is_local else starts[:PIECES_REMOTE]:
        count = min(PIECE_BYTES, own.nbytes - begin)
        pieces = [evidence.files.read(one.file, one.start + begin, count) for one in (own, theirs)]
        if pieces[0] != pieces[1]:
            return False
    return True


def unwrap(name: str) -> str | None:
    """The published name within a name that wrappers or libraries have given a tensor."""
    bare = WRAPPERS.sub("", name, count=1)
    return next((one for one in (f"model.{bare}", bare) if find(one) is not None), None)


def _read_header(files: Files, name: str) -> list[TensorInfo] | str:
    """The tensors of a shard, or why it is damaged. CheckpointError if a hub does not answer."""
    size = files.sizes[name]
    problems: list[str] = []
    unreachable: list[CheckpointError] = []

    def read(start: int, count: int) -> bytes:
        try:
            return files.read(name, start, count)
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}.")
        except CheckpointError as error:
            unreachable.append(error)
        return b""

    try:
        return parse_header(name, size, read)
    except CheckpointError as error:
        if unreachable:
            raise unreachable[0] from None
        return problems[0] if problems else str(error)


def _read_index(evidence: Evidence) -> None:
    if INDEX_NAME not in evidence.files.sizes:
        return
    index, problem = read_json(evidence.files, INDEX_NAME)
    weight_map = (index or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        evidence.index_problem = problem or "it has no weight_map of names to files"
        return
    evidence.index, evidence.index_problem = weight_map, problem
    metadata = (index or {}).get("metadata")
    evidence.total_size = metadata.get("total_size") if isinstance(metadata, dict) else None


def read_json(files: Files, name: str) -> tuple[JsonObject | None, str | None]:
    """The object in a JSON file, or why there is none; or both, where some readers refuse the file
    or read another value.
    """
    if name not in files.sizes:
        return None, "it is missing"
    data = files.read(name, 0, files.sizes[name])
    doubled: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> JsonObject:
        result = dict(pairs)
        if len(result) < len(pairs):
            doubled.extend(key for key, value in pairs if result[key] != value)
        return result

    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:
        return None, f"it is not JSON ({error})"
    if not isinstance(value, dict):
        return None, "it is not a JSON object"
    if data.startswith(codecs.BOM_UTF8):
        return value, "it begins with a byte order mark, which transformers and engines refuse"
    if doubled:
        return value, f"{shorten(doubled)} stands there twice, with different values"
    return value, None
