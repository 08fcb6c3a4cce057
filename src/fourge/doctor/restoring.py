"""config.json, hf_quant_config.json and the other files of a repaired checkpoint.

With a source, a config that differs beyond quantization_config becomes the source's, byte for byte,
with the block inserted; without, keys are set to what the tensors speak for. The exclude list is
made anew from what is on disk. Knows no tensors' bytes. Imports no torch.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, field

from fourge.checkpoint.header import INDEX_NAME
from fourge.checkpoint.metadata import (
    CONFIG_NAME,
    HF_QUANT_CONFIG_NAME,
    exclude_list,
    hf_quant_config,
    quantization_config,
    with_quantization,
)
from fourge.checkpoint.writer import PARTIAL_SUFFIX
from fourge.doctor.architecture import CHECKS
from fourge.doctor.evidence import Evidence, JsonObject
from fourge.doctor.files import Files

GENERATION_NAME = "generation_config.json"
# Rules that a new quantization block puts right, and those that the config around it does.
QUANTIZATION_RULES = {
    "Q01", "Q02", "Q03", "Q04", "Q05", "Q06", "Q07", "Q08", "Q09", "Q10", "Q11", "Q13", "Q14",
    "Q19", "Q20", "M04", "A09", "K10", "D04",
}  # fmt: skip
CONFIG_RULES = {
    "C01", "C02", "C03", "C04", "C05", "C06", "C07", "C10", "C12",
    "X01", "X02", "X03", "X04", "X05", "X06", "X07", "M01", "M09", "M10", "M11",
}  # fmt: skip
FILE_RULES = {"K13", "C07", "C08", "C11"}
# Keys of the pattern of indexers. Where there are none, an indexer that is missing was lost.
SHARING_KEYS = ("indexer_types", "index_topk_pattern", "index_topk_freq")
STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")


@dataclass(frozen=True)
class Layers:
    """What lies where in the repaired checkpoint."""

    unquantized: tuple[int, ...]  # decoder layers without packed experts
    plain_mtp: tuple[int, ...]
    packed_mtp: tuple[int, ...]
    drops_mtp: bool  # the config declares an MTP layer that is not there
    weight_only: bool  # no expert has an input_scale
    unpacks: bool = False  # something else than experts was packed and is BF16 now


@dataclass
class Restored:
    """Texts to write, files to copy, and which rules that puts right, with a sentence each."""

    texts: dict[str, bytes] = field(default_factory=dict)
    copies: dict[str, Files] = field(default_factory=dict)
    done: dict[str, str] = field(default_factory=dict)


def restore_files(evidence: Evidence, rules: Collection[str], layers: Layers) -> Restored:
    """``rules``: ids of the findings."""
    restored = Restored()
    _small_files(evidence, rules, restored)
    text = _config_text(evidence, rules, layers, restored)
    block, anew = _block(evidence, rules, layers)
    changes = text is not None or anew or layers.drops_mtp
    if anew:
        told = "quantization metadata made anew from what is on disk"
        restored.done |= {rule: told for rule in rules if rule in QUANTIZATION_RULES}
        document = _hf_document(evidence, block)
        restored.texts[HF_QUANT_CONFIG_NAME] = (json.dumps(document, indent=4) + "\n").encode()
    elif HF_QUANT_CONFIG_NAME in evidence.files.sizes:
        restored.copies[HF_QUANT_CONFIG_NAME] = evidence.files
    if not changes and CONFIG_NAME in evidence.files.sizes:
        restored.copies[CONFIG_NAME] = evidence.files
    else:
        base = text if text is not None else _text(evidence.files, CONFIG_NAME)
        edited = with_quantization(base or "{}", block, drop_mtp=layers.drops_mtp)
        restored.texts[CONFIG_NAME] = edited.encode()
    return restored


def _text(files: Files, name: str) -> str | None:
    if name not in files.sizes:
        return None
    return files.read(name, 0, files.sizes[name]).decode("utf-8", errors="replace")


# ---- config.json


def _config_text(
    evidence: Evidence, rules: Collection[str], layers: Layers, restored: Restored
) -> str | None:
    """The config to put the block into, or None if the own one stays."""
    named = [rule for rule in rules if rule in CONFIG_RULES]
    if layers.drops_mtp and "M01" in named:
        named.remove("M01")  # with_quantization writes 0
    if not named:
        return None
    source = evidence.source
    if source is not None and source.raw:
        told = "config.json restored from the source, quantization_config inserted"
        restored.done |= dict.fromkeys(named, told)
        return _text(source.files, CONFIG_NAME)
    raw, keys = dict(evidence.raw), _fitting_keys(evidence, named)
    for own in keys.values():
        for key, value in own.items():
            raw.pop(key, None) if value is None else raw.update({key: value})
    if evidence.raw_problem is not None and evidence.raw:
        restored.done["C06"] = "config.json written anew, each key once"
    elif not keys or not evidence.raw:
        return None
    changed = [key for key in {**raw, **evidence.raw} if raw.get(key) != evidence.raw.get(key)]
    told = f"config.json: {', '.join(changed)} set to what the tensors and the tokenizer say"
    restored.done |= dict.fromkeys(keys, told)
    return json.dumps(raw, indent=2, ensure_ascii=False) + "\n"


def _fitting_keys(evidence: Evidence, named: Collection[str]) -> dict[str, JsonObject]:
    """Rule -> the keys that put it right (None: none), as far as files other than the source's
    tell.
    """
    raw = dict(evidence.raw)
    keys: dict[str, JsonObject] = {}
    for check in CHECKS:
        for correction in check(raw, evidence):
            for key, value in correction.keys.items():
                raw.pop(key, None) if value is None else raw.update({key: value})
            rule = correction.finding.rule if correction.finding is not None else ""
            if correction.keys and rule in named:
                keys.setdefault(rule, {}).update(correction.keys)
    keys.pop("X05", None)  # a choice
    if not any(evidence.raw.get(key) is not None for key in SHARING_KEYS):
        keys.pop("X01", None)
    if "M11" in named:
        keys["M11"] = {"index_share_for_mtp_iteration": _shares(evidence)}
    if "C07" in named and (stops := _stops(evidence, evidence.raw.get("eos_token_id"))):
        keys["C07"] = {"eos_token_id": stops}
    return keys


def _shares(evidence: Evidence) -> bool:
    """Whether the model was trained to share selections, going by its indexers."""
    config = evidence.config
    return config is not None and "shared" in config.indexer_types


def _stops(evidence: Evidence, value: object) -> list[int]:
    """The ids that end a turn: those that are there, and those that the tokenizer knows."""
    ids = value if isinstance(value, list) else [value] if isinstance(value, int) else []
    tokens = evidence.special_tokens
    return list(dict.fromkeys([*ids, *(tokens[name] for name in STOPS if name in tokens)]))


# ---- the quantization block


def _block(evidence: Evidence, rules: Collection[str], layers: Layers) -> tuple[JsonObject, bool]:
    """The block for config.json, and whether it is another than the one that is there."""
    own = evidence.quantization
    fits = own and not QUANTIZATION_RULES & set(rules)
    if fits and not layers.unpacks and not _added_mtp(evidence, layers):
        return own, False
    excluded = exclude_list(layers.unquantized, layers.plain_mtp)
    # vLLM's draft head; the layer's other parts are covered by the entries for all layers.
    excluded += [f"model.layers.{layer}.head" for layer in layers.packed_mtp]
    block = quantization_config(excluded)
    if isinstance(own.get("producer"), dict):
        block["producer"] = own["producer"]
    if isinstance(own.get("kv_cache_scheme"), dict):
        block["kv_cache_scheme"] = own["kv_cache_scheme"]
    if layers.weight_only:
        block["quant_algo"] = "W4A16_NVFP4"
        block["config_groups"]["group_0"]["input_activations"] = None
    return block, True


def _added_mtp(evidence: Evidence, layers: Layers) -> bool:
    """Whether an MTP layer comes from the source, which the present list may not exclude."""
    present = {parsed.layer for parsed in evidence.names.values() if parsed is not None}
    packed = evidence.quantized_layers()
    return any(layer not in present or layer in packed for layer in layers.plain_mtp)


def _hf_document(evidence: Evidence, block: JsonObject) -> JsonObject:
    document = hf_quant_config(block["ignore"])
    document["producer"] = block["producer"]
    document["quantization"]["quant_algo"] = block["quant_algo"]
    if "kv_cache_scheme" in block:
        document["quantization"]["kv_cache_quant_algo"] = "FP8"
    return document


# ---- other files


def _small_files(evidence: Evidence, rules: Collection[str], restored: Restored) -> None:
    for name in evidence.files.sizes:
        is_shard = name.endswith(".safetensors") and "/" not in name
        made = name in (CONFIG_NAME, HF_QUANT_CONFIG_NAME, INDEX_NAME)
        old = name.startswith("fourge/repair") or name.endswith(PARTIAL_SUFFIX)
        if not (is_shard or made or old):
            restored.copies[name] = evidence.files
    named = [rule for rule in rules if rule in FILE_RULES]
    source = evidence.source
    if named and source is not None:
        theirs = [name for name in source.files.sizes if _is_of_the_tokenizer(name)]
        restored.copies |= dict.fromkeys(theirs, source.files)
        told = "tokenizer, chat template and generation_config.json copied from the source"
        restored.done |= dict.fromkeys(named, told)
    elif "C07" in rules and (own := evidence.json_file(GENERATION_NAME)):
        own = own | {"eos_token_id": _stops(evidence, own.get("eos_token_id"))}
        restored.copies.pop(GENERATION_NAME, None)
        restored.texts[GENERATION_NAME] = (json.dumps(own, indent=2) + "\n").encode()


def _is_of_the_tokenizer(name: str) -> bool:
    kinds = ("tokenizer", "chat_template", "special_tokens", "added_tokens", "vocab", "merges")
    return "/" not in name and (name.startswith(kinds) or name == GENERATION_NAME)
