"""Are all tensors there, each once, where the index says? Rules K01 to K07, K10 and K12.

A tensor is named by one rule: what damaged shards held by K02, what lies where the index does not
look by K04 or K05, experts by K06, fused or renamed ones by K07, indexers by X01 (sharing.py), the
MTP layer by M01 and M02 (mtp.py); K01 has the rest. Imports no torch.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any

from fourge.checkpoint.header import INDEX_NAME, SINGLE_NAME
from fourge.checkpoint.names import (
    FUSED_DOWN,
    FUSED_GATE_UP,
    PROJECTIONS,
    Role,
    TensorName,
    expert_name,
    find,
)
from fourge.doctor.correction import key_of, list_values
from fourge.doctor.evidence import Evidence, same
from fourge.doctor.findings import Finding, found
from fourge.models.config import ModelConfig
from fourge.models.tensors import expected_tensors, layer_shapes

RULES = ("K02", "K03", "K04", "K05", "M07", "K10", "K12")
RULES_WITH_CONFIG = ("K01", "K06", "K07")
LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Tensors beyond the name table that rules of their own judge: S11 and Q12; K10, S12, S13, Q16, Q17.
SCALES = (".weight_scale", ".weight_scale_2", ".input_scale")
FOREIGN = (
    ".weight_scale_inv", ".pre_quant_scale", ".weight_packed", ".weight_global_scale",
    ".input_global_scale", ".k_scale", ".v_scale", ".kv_scale",
)  # fmt: skip
# Buffers that old exports hold and nobody needs.
BUFFERS = (".inv_freq",)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FP8_KEYS = ("modules_to_not_convert", "weight_block_size", "activation_scheme", "fmt")
HUGE_BYTES = 40 << 30
PACKED_PARTS = ("weight_scale", "weight_scale_2")


def check_shards(evidence: Evidence) -> Iterator[Finding]:
    """RULES: what needs no config."""
    if evidence.damaged:
        first = next(iter(evidence.damaged.values()))
        yield found("K02", sorted(evidence.damaged), first)
    yield from _duplicates(evidence)
    yield from _index(evidence)
    yield from _fp8_leftovers(evidence)
    largest = max(evidence.shards, key=lambda name: evidence.files.sizes[name], default=None)
    if largest is not None and evidence.files.sizes[largest] > HUGE_BYTES:
        size = evidence.files.sizes[largest] / 1e9
        yield found("K12", largest, f"it has {size:.1f} GB.")


def shard_figures(evidence: Evidence) -> dict[str, Any]:
    """K12: how many shards there are, and how large."""
    sizes = [evidence.files.sizes[name] for name in evidence.shards]
    return {
        "count": len(sizes),
        "bytes": sum(sizes),
        "largest": max(sizes, default=0),
        "smallest": min(sizes, default=0),
        "tensors": len(evidence.tensors),
    }


def check_tensors(evidence: Evidence) -> Iterator[Finding]:
    """RULES_WITH_CONFIG, against what the config demands."""
    foreign = [
        name
        for name, parsed in evidence.names.items()
        if _is_fused(name) or (parsed is not None and parsed.suffix in (FUSED_GATE_UP, FUSED_DOWN))
    ]
    foreign += evidence.renamed
    if foreign:
        message = f"{len(foreign):,} tensors have names of modules in memory; first {foreign[0]}."
        yield found("K07", foreign, message)
    if not evidence.is_unclear and evidence.tensors:
        there = evidence.names.keys() | evidence.lost
        yield from _missing(evidence, there)
        yield from _incomplete_experts(evidence, there)
    yield from _strangers(evidence)


def _is_fused(name: str) -> bool:
    """Whether this is a scale, or another part, of an expert tensor that transformers fuses."""
    return ".mlp.experts.gate_up_proj" in name or ".mlp.experts.down_proj" in name


# ---- shards and index


def _duplicates(evidence: Evidence) -> Iterator[Finding]:
    """K03."""
    copies: dict[str, list[str]] = {}
    for file, infos in evidence.shards.items():
        for info in infos:
            copies.setdefault(info.name, []).append(file)
    twice = {name: files for name, files in copies.items() if len(files) > 1}
    if twice:
        name, files = next(iter(twice.items()))
        message = f"{len(twice):,} tensors lie in several shards: {name} in {list_values(files)}."
        yield found("K03", list(twice), message)


def _index(evidence: Evidence) -> Iterator[Finding]:
    """K04, K05 and M07."""
    index = evidence.index
    if evidence.index_problem is not None:
        yield found("K05", INDEX_NAME, f"the index cannot be used: {evidence.index_problem}.")
    if index is None:
        if INDEX_NAME not in evidence.files.sizes and set(evidence.shards) - {SINGLE_NAME}:
            message = f"{len(evidence.shards)} shards lie here without {INDEX_NAME}."
            yield found("K05", INDEX_NAME, message)
        return
    named = set(index.values())
    for rule, files in _orphans(evidence, index).items():
        count = sum(len(evidence.shards[file]) for file in files)
        yield found(rule, files, f"the index does not name it; it holds {count:,} tensors.")
    tensors = evidence.tensors.values()
    lying = {info.name: info.file for info in tensors if info.file in named}
    wrong = [name for name, file in lying.items() if index.get(name) != file]
    # Of what is nowhere, only strangers: missing tensors are named as such.
    wrong += [
        name for name in index.keys() - lying.keys() - evidence.lost
        if name not in evidence.tensors and _is_stranger(evidence, name)
    ]  # fmt: skip
    if wrong:
        name = wrong[0]
        told = f"{name} in {index[name]}" if name in index else f"{name} nowhere"
        where = lying.get(name, "no shard")
        message = f"the index places {told}, it lies in {where}."
        yield found("K05", sorted(wrong), message)


def _orphans(evidence: Evidence, index: dict[str, str]) -> dict[str, list[str]]:
    """Rule -> shards that the index does not name; those that hold only copies are K03's."""
    orphans: dict[str, list[str]] = {}
    chosen = set(map(id, evidence.tensors.values()))
    for file in sorted(set(evidence.shards) - set(index.values())):
        own = [info.name for info in evidence.shards[file] if id(info) in chosen]
        layers = {int(match[1]) if (match := LAYER.match(name)) else -1 for name in own}
        if own:
            is_mtp = min(layers) >= len(evidence.decoder_layers) > 0
            orphans.setdefault("M07" if is_mtp else "K04", []).append(file)
    return orphans


def _is_stranger(evidence: Evidence, name: str) -> bool:
    """Whether the model has no tensor of this name."""
    parsed, config = find(name), evidence.config
    if parsed is None or config is None or parsed.layer is None:
        return parsed is None
    last = config.num_hidden_layers + bool(evidence.raw.get("num_nextn_predict_layers"))
    if parsed.layer >= last:
        return True
    return parsed.expert is not None and parsed.expert >= config.n_routed_experts


def _fp8_leftovers(evidence: Evidence) -> Iterator[Finding]:
    """K10."""
    places = [name for name in evidence.tensors if name.endswith(".weight_scale_inv")]
    block = evidence.quantization
    keys = [key for key in FP8_KEYS if key in block]
    if block.get("quant_method") == "fp8" and "quant_algo" not in block:
        keys.append("quant_method")
    places += [key_of(f"quantization_config.{key}") for key in keys]
    if places:
        message = f"{len(places):,} tensors or keys are left over from FP8: {places[0]}."
        yield found("K10", places, message)


# ---- tensors


def _missing(evidence: Evidence, there: set[str]) -> Iterator[Finding]:
    """K01: what is neither of an expert, an indexer nor the MTP layer."""
    assert evidence.config is not None
    expected = [
        name
        for name in expected_tensors(evidence.config, mtp=False)
        if ".mlp.experts." not in name and ".indexer." not in name
    ]
    missing = [name for name in expected if name not in there]
    if missing:
        yield found("K01", missing, f"{len(missing):,} of {len(expected):,} tensors are missing.")


def _incomplete_experts(evidence: Evidence, there: set[str]) -> Iterator[Finding]:
    """K06. An expert's lost input_scale is A01."""
    config = evidence.config
    assert config is not None
    missing: list[str] = []
    for layer in range(config.num_hidden_layers):
        own = evidence.suffixes.get(layer, set())
        if not config.is_sparse(layer) or own.intersection((FUSED_GATE_UP, FUSED_DOWN)):
            continue
        for expert in range(config.n_routed_experts):
            for projection in PROJECTIONS:
                missing += _missing_parts(evidence, there, (layer, expert, projection))
    if missing:
        experts = {name.rsplit(".", 2)[0] for name in missing}
        message = f"{len(missing):,} tensors of {len(experts):,} experts are missing."
        yield found("K06", missing, message)


def _missing_parts(evidence: Evidence, there: set[str], key: tuple[int, int, str]) -> list[str]:
    weight = expert_name(*key)
    if weight not in there:
        return [] if f"{weight}_packed" in evidence.tensors else [weight]
    info = evidence.tensors.get(weight)
    if info is None or info.dtype not in ("U8", "I8"):
        return []
    parts = [expert_name(*key, part) for part in PACKED_PARTS]
    return [name for name in parts if name not in there]


def _strangers(evidence: Evidence) -> Iterator[Finding]:
    """K01 the other way round: tensors that the config has no place for."""
    config = evidence.config
    assert config is not None
    layers = range(config.num_hidden_layers + len(config.mtp_layers))
    shapes = {layer: layer_shapes(config, layer).keys() for layer in layers}
    strangers = [
        name
        for name, parsed in evidence.names.items()
        if not (
            _is_judged_elsewhere(evidence, name)
            if parsed is None
            else parsed.layer is None
            or (parsed.layer in shapes and _has_place(parsed, config, shapes[parsed.layer]))
        )
    ]
    if config.tie_word_embeddings and _has_own_head(evidence):
        strangers.append(HEAD)
    if strangers:
        message = f"{len(strangers):,} tensors have no place in this model: {strangers[0]}."
        yield found("K01", strangers, message)


def _has_own_head(evidence: Evidence) -> bool:
    """Whether lm_head holds something else than the embedding."""
    head, embedding = evidence.tensors.get(HEAD), evidence.tensors.get(EMBEDDING)
    return head is not None and embedding is not None and not same(evidence, head, embedding)


def _is_judged_elsewhere(evidence: Evidence, name: str) -> bool:
    base = name.rpartition(".")[0]
    is_scale = name.endswith(SCALES) and f"{base}.weight" in evidence.tensors
    return is_scale or name.endswith(FOREIGN) or _is_fused(name)


def _has_place(parsed: TensorName, config: ModelConfig, suffixes: Collection[str]) -> bool:
    assert parsed.layer is not None
    if parsed.role == Role.ROUTED_EXPERT:
        return config.is_sparse(parsed.layer)
    if parsed.role == Role.INDEXER:
        return config.uses_dsa
    if parsed.role == Role.MTP:
        return parsed.layer >= config.num_hidden_layers
    return parsed.suffix in suffixes or parsed.suffix.endswith(BUFFERS)
