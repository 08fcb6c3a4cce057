"""Do engines build every module as it lies on disk? Rules Q05 to Q09, Q11, Q12, Q14 and M04.

An exclude list is judged by what both engines' matchers (matching.py) make of it, module by module,
not by its looks. Where they go wrong, the entry that misleads them names the rule: a layer's entry
that swallows others (Q06), a single expert's (Q07), a name of a library's module (Q19, by
metadata.py). Imports no torch.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from fourge.checkpoint.names import layer_name
from fourge.doctor.evidence import Evidence
from fourge.doctor.findings import Finding, found
from fourge.doctor.matching import (
    EXCLUDES,
    SGLANG_FUSED,
    TAILS,
    VLLM_FUSED,
    HalfExcludedError,
)
from fourge.doctor.shapes import format_of
from fourge.doctor.sharing import PLAIN_DTYPES
from fourge.models.config import ModelConfig

RULES = ("M04", "Q05", "Q06", "Q07", "Q08", "Q09", "Q11", "Q12", "Q14")
LAYER_ENTRY = re.compile(r"model\.layers\.\d+\*?")
EXPERT_ENTRY = re.compile(r".*\.experts\.\d+(\*|\..*)?")
IN_MEMORY_ENTRY = re.compile(
    r"(module\.|_orig_mod\.|base_model\.model\.|(model\.)?language_model\.|model\.model\.).*"
    r"|.*\.experts\.(gate_up_proj|down_proj)\*?"
)
PLAIN, PACKED = "BF16", "NVFP4"
TOLD = "Q19"  # by metadata.py
SHARED_EXPERTS = "mlp.shared_experts."
FUSED = {"vllm": VLLM_FUSED, "sglang": SGLANG_FUSED}
# The checkpoint's modules of a layer that engines may quantize, besides routed experts.
ATTENTION = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
             "indexer.wq_b")  # fmt: skip
INDEXER_QUERY = "self_attn.indexer.wq_b"
MLP = ("gate_proj", "up_proj", "down_proj")


class Module(NamedTuple):
    """A module at run time: its layer (None: lm_head), its prefix, and its format on disk."""

    layer: int | None
    prefix: str
    format: str


class Misfit(NamedTuple):
    """A module that an engine builds otherwise than it lies on disk, or refuses (half)."""

    engine: str
    module: Module
    is_half: bool


def check_exclusion(evidence: Evidence, entries: Sequence[str]) -> Iterator[Finding]:
    """RULES, for the exclude list that engines read."""
    config = evidence.config
    assert config is not None
    misfits: dict[str, list[Misfit]] = {}
    for engine in EXCLUDES:
        for misfit in _misfits(engine, modules(evidence, engine), entries):
            rule = _rule(misfit, entries, config)
            misfits.setdefault(rule, []).append(misfit)
    misfits.pop(TOLD, None)
    if "M04" in misfits:
        misfits.pop("Q09", None)
    if not entries and misfits:
        misfits = {"Q05": [misfit for own in misfits.values() for misfit in own]}
    for rule, own in sorted(misfits.items()):
        yield _finding(rule, own, entries)
    yield from _quantized_shared_experts(evidence)
    if "Q08" not in misfits:
        yield from _tails(evidence, entries)


def modules(evidence: Evidence, engine: str) -> Iterator[Module]:
    """What an engine may quantize, with the format that its weights have on disk."""
    config = evidence.config
    assert config is not None
    layers = range(config.num_hidden_layers + len(config.mtp_layers))
    for layer in layers:
        is_draft = layer >= config.num_hidden_layers
        if is_draft and engine == "sglang":
            continue  # it builds drafts without quantization (deepseek_nextn.py:75-79)
        names = [f"self_attn.{name}" for name in ATTENTION]
        names += [(SHARED_EXPERTS if config.is_sparse(layer) else "mlp.") + name for name in MLP]
        formats = _formats(evidence, layer, names)
        for suffix, kind in _fuse(formats, FUSED[engine]).items():
            yield Module(layer, layer_name(layer, suffix), kind)
        kinds = {
            format_of(projection)
            for own in evidence.by_layer.get(layer, {}).values()
            for projection in own.values()
        }
        kind = next(iter(kinds)) if len(kinds) == 1 else PACKED if PACKED in kinds else ""
        yield Module(layer, layer_name(layer, "mlp.experts"), _simple(kind))
        if is_draft:
            yield Module(layer, layer_name(layer, "head"), PLAIN)
    head = _formats(evidence, None, ["lm_head"]).get("lm_head", "")
    yield Module(None, "lm_head", head)


def _formats(evidence: Evidence, layer: int | None, names: Iterable[str]) -> dict[str, str]:
    """Of the modules that are there: PLAIN, PACKED, or "" for what another rule judges."""
    result = {}
    for name in names:
        full = name if layer is None else layer_name(layer, name)
        info = evidence.tensors.get(f"{full}.weight")
        if info is not None:
            is_told = evidence.is_fp8_leftover(f"{full}.weight") or not info.nbytes
            is_told |= name == INDEXER_QUERY and info.dtype not in PLAIN_DTYPES  # X10
            result[name] = "" if is_told else _simple(info.dtype)
    return result


def _simple(kind: str) -> str:
    if kind in PLAIN_DTYPES:
        return PLAIN
    return PACKED if kind else ""


def _fuse(formats: Mapping[str, str], fused: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Suffixes at run time; a fused module has the format of its first part."""
    result = dict(formats)
    for name, parts in fused.items():
        for head in dict.fromkeys(suffix.rpartition(".")[0] for suffix in formats):
            own = [f"{head}.{part}" for part in parts]
            if all(one in result for one in own):
                kinds = {result.pop(one) for one in own}
                result[f"{head}.{name}"] = kinds.pop() if len(kinds) == 1 else ""
    return result


def _misfits(engine: str, built: Iterable[Module], entries: Sequence[str]) -> Iterator[Misfit]:
    for module in built:
        if not module.format:
            continue
        try:
            is_excluded = EXCLUDES[engine](module.prefix, entries)
        except HalfExcludedError:
            yield Misfit(engine, module, True)
            continue
        if is_excluded != (module.format == PLAIN):
            yield Misfit(engine, module, False)


def _rule(misfit: Misfit, entries: Sequence[str], config: ModelConfig) -> str:
    """The most specific rule that tells what went wrong."""
    engine, module, is_half = misfit
    if is_half:
        return "Q08"
    if module.layer is not None and module.layer >= config.num_hidden_layers:
        if module.prefix.endswith(".head"):
            return "Q09"
        if module.format == PLAIN:
            return "M04"
    if module.format == PACKED:
        guilty = _guilty(engine, module, entries)
        if any(map(is_in_memory, guilty)):
            return TOLD
        if any(LAYER_ENTRY.fullmatch(entry) for entry in guilty):
            return "Q06"
        if any(EXPERT_ENTRY.fullmatch(entry) for entry in guilty):
            return "Q07"
    elif any(_in_memory_of(entry, module.prefix) for entry in entries):
        return TOLD
    return "Q11" if SHARED_EXPERTS in module.prefix else "Q05"


def is_in_memory(entry: str) -> bool:
    """Whether an entry has a name that no published checkpoint has."""
    return IN_MEMORY_ENTRY.fullmatch(entry) is not None


def _in_memory_of(entry: str, prefix: str) -> bool:
    """Whether an entry is meant for this module, under another name."""
    if not is_in_memory(entry):
        return False
    _, marker, rest = entry.partition("layers.")
    bare = f"model.{marker}{rest}".rstrip("*").rstrip(".")
    return prefix.startswith(bare) or bare.startswith(prefix)


def _guilty(engine: str, module: Module, entries: Sequence[str]) -> list[str]:
    """Entries that by themselves make the engine leave the module unquantized."""
    return [entry for entry in entries if _excludes_alone(engine, module.prefix, entry)]


def _excludes_alone(engine: str, prefix: str, entry: str) -> bool:
    try:
        return EXCLUDES[engine](prefix, [entry])
    except HalfExcludedError:
        return False


def _finding(rule: str, misfits: Sequence[Misfit], entries: Sequence[str]) -> Finding:
    first = misfits[0]
    engines = sorted({misfit.engine for misfit in misfits}, reverse=True)
    names = " and ".join({"vllm": "vLLM", "sglang": "SGLang"}[engine] for engine in engines)
    places = list(dict.fromkeys(misfit.module.prefix for misfit in misfits))
    if first.is_half:
        message = f"the exclude list has some parts of {first.module.prefix} and not all: {names}."
    elif first.module.format == PLAIN:
        message = f"{first.module.prefix} is BF16 and not excluded, going by {names}."
    else:
        guilty = _guilty(first.engine, first.module, entries)
        told = f' by "{guilty[0]}"' if guilty else ""
        message = f"{first.module.prefix} is NVFP4 and excluded{told}, going by {names}."
    return found(rule, places, message, engines=engines)


def _quantized_shared_experts(evidence: Evidence) -> Iterator[Finding]:
    """Q12."""
    names = [
        name
        for name, info in evidence.tensors.items()
        if f".{SHARED_EXPERTS}" in name and name.endswith(".weight")
        if info.nbytes and info.dtype not in PLAIN_DTYPES and not evidence.is_fp8_leftover(name)
    ]
    if names:
        yield found("Q12", names, f"{names[0]} is {evidence.tensors[names[0]].dtype}.")


def _tails(evidence: Evidence, entries: Sequence[str]) -> Iterator[Finding]:
    """Q14: entries of single layers that sglang takes for all; a list of all layers is meant so."""
    config = evidence.config
    assert config is not None
    odd = []
    for tail in TAILS:
        named = {
            entry for entry in entries if re.fullmatch(rf"model\.layers\.\d+\..*{tail}", entry)
        }
        if named and len(named) < config.num_hidden_layers:
            odd += sorted(named)
    if odd:
        yield found("Q14", odd, f'SGLang excludes the projection of "{odd[0]}" in all layers.')
