"""Rules X: which layers have an indexer of their own, to three readers and on disk.

transformers 5.23 and sglang 0.5.23 read indexer_types, then index_topk_pattern, then freq/offset;
vllm 0.33.0 never reads indexer_types (deepseek_v2.py:1142-1157). Contexts up to index_topk tokens
do not show any of these mistakes. Imports no torch.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fourge.checkpoint.names import layer_name
from fourge.doctor.correction import Correction, key_of, list_values, shown
from fourge.doctor.evidence import Evidence, JsonObject
from fourge.doctor.findings import Finding, found
from fourge.models.config import DSA_FAMILIES

TYPES, PATTERN, FREQ, OFFSET = SHARING_KEYS = (
    "indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"
)  # fmt: skip
DEFAULT_OFFSET = 2
INTERLEAVE = "indexer_rope_interleave"
INDEXER = "self_attn.indexer."
QUERY, KEY_BIAS = INDEXER + "wq_b.weight", INDEXER + "k_norm.bias"
PARTS = (
    QUERY, INDEXER + "wk.weight", INDEXER + "k_norm.weight", KEY_BIAS,
    INDEXER + "weights_proj.weight",
)  # fmt: skip
PLAIN_DTYPES = ("BF16", "F16", "F32")
FULL, SHARED = "full", "shared"
RULES = ("X01", "X09", "X10")


def check_interleave(raw: JsonObject, evidence: Evidence) -> Iterator[Correction]:
    """X07."""
    value = raw.get(INTERLEAVE)
    if raw.get("model_type") == "glm_moe_dsa" and value is not True:
        told = "is missing" if value is None else f"is {shown(value)}"
        message = f"{INTERLEAVE} {told}: vLLM and SGLang rotate half-split."
        yield Correction(found("X07", key_of(INTERLEAVE), message), {INTERLEAVE: True})


class Readings(NamedTuple):
    """Which decoder layers are full, to each reader, and which hold an indexer's tensors."""

    transformers: list[bool]  # and sglang
    vllm: list[bool]
    on_disk: list[bool] | None  # None where shards are missing


def check_sharing(raw: JsonObject, evidence: Evidence) -> Iterator[Correction]:
    """X02 to X06, and X01 for whole layers; one of them at most."""
    count = raw.get("num_hidden_layers")
    if raw.get("model_type") not in DSA_FAMILIES or not isinstance(count, int):
        return
    on_disk = _on_disk(evidence, count)
    problems = {PATTERN: _pattern_problem(raw, count), TYPES: _types_problem(raw, count)}
    broken = {key: told for key, told in problems.items() if told is not None}
    if broken:
        sound = {key: value for key, value in raw.items() if key not in broken}
        kinds = _as_transformers(sound, count) if on_disk is None else on_disk
        finding = found("X03", [key_of(key) for key in broken], " ".join(broken.values()))
        yield Correction(finding, _fitting(kinds))
        return
    readings = Readings(_as_transformers(raw, count), _as_vllm(raw, count), on_disk)
    finding = _judge(raw, readings)
    if finding is not None:
        kinds = readings.transformers if on_disk is None or finding.rule == "X05" else on_disk
        yield Correction(finding, _fitting(kinds))
    elif raw.get(FREQ) is not None and raw.get(PATTERN) is not None:
        # No reader looks at freq beside a pattern.
        yield Correction(None, {FREQ: None, OFFSET: None})


def _fitting(kinds: list[bool]) -> JsonObject:
    """Keys that every reader reads as ``kinds``."""
    if all(kinds):
        return dict.fromkeys(SHARING_KEYS)
    return {
        TYPES: [FULL if is_full else SHARED for is_full in kinds],
        PATTERN: "".join("F" if is_full else "S" for is_full in kinds),
        FREQ: None,
        OFFSET: None,
    }


def _judge(raw: JsonObject, readings: Readings) -> Finding | None:
    transformers, vllm, on_disk = readings
    keys = [key_of(key) for key in SHARING_KEYS if raw.get(key) is not None]
    if transformers != vllm:
        layer = next(
            i for i, pair in enumerate(zip(transformers, vllm, strict=True)) if len(set(pair)) > 1
        )
        message = (
            f"layer {layer} is {_word(transformers[layer])} to transformers and SGLang,"
            f" {_word(vllm[layer])} to vLLM, which never reads indexer_types."
        )
        if raw.get(PATTERN) is None and raw.get(FREQ) is None:
            return found("X04", key_of(TYPES), message)
        overridden = raw.get(FREQ) is not None and _as_freq(raw, len(vllm)) == transformers
        if overridden and on_disk in (None, transformers) and not all(transformers):
            return found("X06", key_of(PATTERN), message)
        return found("X02", keys, message)
    return _against_disk(raw, vllm, on_disk, keys) if on_disk is not None else None


def _against_disk(
    raw: JsonObject, said: list[bool], on_disk: list[bool], keys: list[str]
) -> Finding | None:
    without = [i for i, there in enumerate(on_disk) if said[i] and not there]
    spare = [i for i, there in enumerate(on_disk) if there and not said[i]]
    freq = _as_freq(raw, len(said)) if raw.get(FREQ) is not None else None
    if without and raw.get(PATTERN) is not None and (spare or on_disk == freq):
        message = f"the pattern asks for indexers in layers {_few(without)}, which have none."
        return found("X06", keys, message)
    if without:
        message = f"layers {_few(without)} should have an indexer and hold no tensor of one."
        return found("X01", _places(without), message)
    if spare and all(on_disk):
        message = f"{len(spare)} layers share a selection though all have a trained indexer."
        return found("X05", keys, message)
    if spare:
        message = f"layers {_few(spare)} share a selection but hold an indexer of their own."
        return found("X01", _places(spare), message)
    return None


def _places(layers: list[int]) -> list[str]:
    return [layer_name(layer, INDEXER.rstrip(".")) for layer in layers]


def _few(layers: list[int]) -> str:
    return list_values(layers[:6]) + (", ..." if layers[6:] else "")


def _word(is_full: bool) -> str:
    return FULL if is_full else SHARED


def _pattern_problem(raw: JsonObject, count: int) -> str | None:
    pattern = raw.get(PATTERN)
    if pattern is None:
        return None
    letters = list(pattern) if isinstance(pattern, str | list) else []
    if not letters or any(letter not in ("F", "S") for letter in letters):
        return f"{PATTERN} is {shown(pattern)}; needed are letters F and S."
    if len(letters) not in (count, count + 1):
        return f"{PATTERN} has {len(letters)} letters for {count} layers."
    if len(letters) == count + 1 and letters[-1] != "F":
        return f"the last letter of {PATTERN} is S: the MTP layer has an indexer of its own."
    if letters[0] != "F":
        return f"{PATTERN} begins with S: the first layer has none to share with."
    return None


def _types_problem(raw: JsonObject, count: int) -> str | None:
    types = raw.get(TYPES)
    if types is None:
        return None
    if (
        not isinstance(types, list)
        or len(types) != count
        or any(kind not in (FULL, SHARED) for kind in types)
    ):
        return f"{TYPES} is {shown(types)}; needed are {count} entries, full or shared."
    if types[:1] != [FULL]:
        return f"{TYPES} begins with shared: the first layer has none to share with."
    return None


def _as_transformers(raw: Mapping[str, Any], count: int) -> list[bool]:
    """sglang has the same order."""
    if raw.get(TYPES) is not None:
        return [kind == FULL for kind in raw[TYPES]]
    return _as_vllm(raw, count)


def _as_vllm(raw: Mapping[str, Any], count: int) -> list[bool]:
    if raw.get(PATTERN) is not None:
        return [letter == "F" for letter in list(raw[PATTERN])[:count]]
    return _as_freq(raw, count)


def _as_freq(raw: Mapping[str, Any], count: int) -> list[bool]:
    freq, offset = raw.get(FREQ), raw.get(OFFSET)
    offset = DEFAULT_OFFSET if offset is None else offset
    if not isinstance(freq, int) or freq < 1 or not isinstance(offset, int):
        return [True] * count
    return [max(layer - offset + 1, 0) % freq == 0 for layer in range(count)]


def sharing_on_disk(evidence: Evidence, count: int) -> JsonObject:
    """Keys that fit the indexers on disk, for ``count`` decoder layers."""
    on_disk = _on_disk(evidence, count)
    return dict.fromkeys(SHARING_KEYS) if on_disk is None else _fitting(on_disk)


def _on_disk(evidence: Evidence, count: int) -> list[bool] | None:
    if evidence.damaged or not evidence.tensors:
        return None
    return [
        any(suffix.startswith(INDEXER) for suffix in evidence.suffixes.get(layer, ()))
        for layer in range(count)
    ]


def check_indexers(evidence: Evidence) -> Iterator[Finding]:
    """X01 for single tensors, X09 and X10."""
    config = evidence.config
    assert config is not None
    if not config.uses_dsa or evidence.is_unclear:
        return
    missing: list[str] = []
    no_bias: list[str] = []
    quantized: list[str] = []
    queries: list[str] = []
    for layer in range(config.num_hidden_layers + len(config.mtp_layers)):
        own = evidence.suffixes.get(layer, set())
        if not own.intersection(PARTS) and layer < config.num_hidden_layers:
            continue  # a whole indexer: check_sharing
        lacking = [part for part in PARTS if part not in own]
        names = [layer_name(layer, part) for part in lacking]
        if lacking == [KEY_BIAS]:
            no_bias += names
        elif layer < config.num_hidden_layers:  # the MTP layer's: mtp.py
            missing += names
        for part in own.intersection(PARTS):
            info = evidence.tensors.get(layer_name(layer, part))
            if info is not None and info.dtype not in PLAIN_DTYPES:
                (queries if part == QUERY else quantized).append(info.name)
    if missing:
        yield found("X01", missing, f"{len(missing)} tensors of indexers are missing.")
    if no_bias:
        message = "the indexer's key norm has no bias."
        yield found("X09", no_bias, message, severity="warning")
    for rule, names in (("X09", quantized), ("X10", queries)):
        if names:
            message = f"{len(names)} tensors are {evidence.tensors[names[0]].dtype}."
            yield found(rule, sorted(names), message)
