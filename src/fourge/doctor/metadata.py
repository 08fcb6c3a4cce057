"""What config.json and hf_quant_config.json say of the quantization: rules Q and M04.

vLLM and SGLang read config.json's block and, where there is none, the other file; vLLM reads
ignore, then exclude_modules, SGLang modules_to_not_convert in between (vllm 0.33.0
modelopt.py:288-405, 776-837; sglang 0.5.23 modelopt_quant.py:1595-1702). Of a checkpoint in
compressed-tensors form only the recipe is compared. Imports no torch.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from fourge.checkpoint.metadata import CONFIG_NAME, HF_QUANT_CONFIG_NAME
from fourge.checkpoint.names import layer_name
from fourge.doctor.correction import key_of, shown
from fourge.doctor.evidence import Evidence, JsonObject
from fourge.doctor.exclusion import SHARED_EXPERTS, check_exclusion, is_in_memory
from fourge.doctor.findings import Finding, found
from fourge.doctor.sharing import PLAIN_DTYPES

RULES = ("M04", "Q01", "Q02", "Q03", "Q04", "Q05", "Q06", "Q07", "Q08", "Q09", "Q10", "Q11", "Q12",
         "Q13", "Q14", "Q15", "Q17", "Q18", "Q19", "Q20")  # fmt: skip
LIST_KEYS = ("ignore", "modules_to_not_convert", "exclude_modules")
NESTED_KEYS = ("group_size", "kv_cache_quant_algo", "exclude_modules")
# What both engines know for packed experts; NVFP4_AWQ is S12.
ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ")
BLOCK = "quantization_config"
RECIPE_NAME = "recipe.yaml"
ROUTER_ENTRY = re.compile(r"model\.layers\.(\d+)\.mlp\.gate")
# Omitted routers although a vLLM of its time wanted them (with transformers 5).
OMITS_ROUTERS = "0.45"
KV_SCALE = re.compile(r".*\.(k|v|kv)_scale")
LOADED_KV_SCALE = re.compile(r"model\.layers\.\d+\.self_attn\.(attn\.)?[kv]_scale")


def check_metadata(evidence: Evidence) -> Iterator[Finding]:
    """All of RULES."""
    yield from _kv_names(evidence)
    yield from _recipe(evidence)
    if not evidence.quantized_layers():
        return
    blocks = _blocks(evidence)
    if not blocks:
        problem = evidence.hf_quant_problem if evidence.hf_quant is None else "it is empty"
        message = f"experts are packed, config.json has no {BLOCK}, and {HF_QUANT_CONFIG_NAME}:"
        yield found("Q01", [CONFIG_NAME, HF_QUANT_CONFIG_NAME], f"{message} {problem}.")
        return
    yield from _agreement(evidence, blocks)
    yield from _nested_keys(evidence)
    yield from _algorithm(evidence, blocks)
    yield from _provenance(evidence)
    lists, problems = _lists(blocks)
    yield from problems
    if lists and not _is_fp8(evidence):
        entries = next(iter(lists.values()))
        findings = list(check_exclusion(evidence, entries))
        yield from findings
        told = {finding.rule for finding in findings}
        yield from _spelling(evidence, entries, told)


def _blocks(evidence: Evidence) -> dict[str, JsonObject]:
    """Place -> block, in the order in which engines read them; what is nested is unwrapped."""
    blocks = {}
    if evidence.quantization:
        inner = evidence.quantization.get("quantization")
        is_nested = isinstance(inner, dict)
        place = f"{BLOCK}.quantization" if is_nested else BLOCK
        blocks[key_of(place)] = inner if is_nested else evidence.quantization
    if evidence.nested:
        blocks[key_of("quantization", HF_QUANT_CONFIG_NAME)] = evidence.nested
    return blocks


def _agreement(evidence: Evidence, blocks: Mapping[str, JsonObject]) -> Iterator[Finding]:
    """Q01 and Q15."""
    declared = evidence.raw.get(BLOCK)
    if declared is not None and not isinstance(declared, dict):
        yield found("Q01", key_of(BLOCK), f"{BLOCK} is {shown(declared)}; needed is an object.")
    is_there = HF_QUANT_CONFIG_NAME in evidence.files.sizes
    if is_there and (evidence.hf_quant_problem is not None or not evidence.nested):
        problem = evidence.hf_quant_problem or "it has no quantization"
        message = f"{HF_QUANT_CONFIG_NAME} cannot be used: {problem}."
        yield found("Q01", HF_QUANT_CONFIG_NAME, message)
    if len(blocks) == 2:
        ours, theirs = blocks.values()
        wrong = [key for key, same in _compare(ours, theirs).items() if not same]
        if wrong:
            places = [f"{place}.{key}" for place in blocks for key in wrong]
            yield found("Q01", places, f"the two files differ in {', '.join(wrong)}.")
    declared_kv = [
        f"{place}.{key}"
        for place, block in blocks.items()
        for key in ("kv_cache_scheme", "kv_cache_quant_algo")
        if block.get(key) is not None
    ]
    if declared_kv:
        yield found("Q15", declared_kv, "an FP8 KV cache is declared.")


def _compare(ours: JsonObject, theirs: JsonObject) -> dict[str, bool]:
    """Whether the two blocks say the same, by key; what is no algorithm at all is Q03's."""
    algorithms = [str(block.get("quant_algo")).upper() for block in (ours, theirs)]
    groups = ours.get("config_groups")
    if isinstance(groups, dict) and all(
        isinstance(one, dict) and one.get("input_activations") is None for one in groups.values()
    ):
        algorithms[0] = algorithms[1] if "NVFP4" in algorithms[1] else algorithms[0]
    has_kv = [
        any(block.get(key) is not None for key in ("kv_cache_scheme", "kv_cache_quant_algo"))
        for block in (ours, theirs)
    ]
    sound = all(algorithm in ALGORITHMS for algorithm in algorithms)
    return {
        "quant_algo": not sound or algorithms[0] == algorithms[1],
        "kv_cache": has_kv[0] == has_kv[1],
    }


def _nested_keys(evidence: Evidence) -> Iterator[Finding]:
    """Q02."""
    inner = evidence.quantization.get("quantization")
    documents = {HF_QUANT_CONFIG_NAME: evidence.nested, key_of(f"{BLOCK}.quantization"): inner}
    missing = [
        f"{place}: {key}"
        for place, block in documents.items()
        for key in NESTED_KEYS
        if isinstance(block, dict) and block and key not in block
    ]
    if missing:
        yield found(
            "Q02", missing, f"{', '.join(missing)} missing; null would do for the KV cache."
        )


def _algorithm(evidence: Evidence, blocks: Mapping[str, JsonObject]) -> Iterator[Finding]:
    """Q03."""
    wrong: dict[str, object] = {}
    method = evidence.quantization.get("quant_method")
    is_fp8 = _is_fp8(evidence)
    if evidence.quantization and not is_fp8 and not str(method).startswith("modelopt"):
        wrong[key_of(f"{BLOCK}.quant_method")] = method
    for place, block in blocks.items():
        algorithm = block.get("quant_algo")
        if algorithm not in ALGORITHMS and not (is_fp8 and block is evidence.quantization):
            wrong[f"{place}.quant_algo"] = algorithm
    wrong |= _other_numbers(evidence.quantization)
    if wrong:
        told = ", ".join(f"{place} is {shown(value)}" for place, value in wrong.items())
        yield found("Q03", list(wrong), f"{told}; needed are 'modelopt' and 'NVFP4', 4-bit floats.")


def _other_numbers(block: JsonObject) -> dict[str, object]:
    """Schemes of config_groups whose numbers are no 4-bit floats, with the key that says so."""
    groups = block.get("config_groups")
    return {
        key_of(f"{BLOCK}.config_groups.{group}.{part}.{key}"): scheme[key]
        for group, schemes in (groups.items() if isinstance(groups, dict) else ())
        for part in ("weights", "input_activations")
        if isinstance(schemes, dict) and isinstance(scheme := schemes.get(part), dict)
        for key, wanted in (("num_bits", 4), ("type", "float"))
        if scheme.get(key, wanted) != wanted
    }


def _is_fp8(evidence: Evidence) -> bool:
    """Whether config.json still has the block of an FP8 source: K10."""
    block = evidence.quantization
    return block.get("quant_method") == "fp8" and "quant_algo" not in block


def _provenance(evidence: Evidence) -> Iterator[Finding]:
    """Q20."""
    producers = [
        block.get("producer")
        for block in (evidence.quantization, evidence.hf_quant or {})
        if isinstance(block.get("producer"), dict)
    ]
    if not any(one.get("name") and one.get("version") for one in producers if one):
        place = key_of(f"{BLOCK}.producer")
        yield found("Q20", place, "no file names the tool that made this checkpoint.")


# ---- exclude lists


def _lists(blocks: Mapping[str, JsonObject]) -> tuple[dict[str, list[str]], list[Finding]]:
    """Place -> exclude list, the one that engines read first; and Q04."""
    said = {
        f"{place}.{key}": block[key]
        for place, block in blocks.items()
        for key in LIST_KEYS
        if key in block and key != "modules_to_not_convert"  # K10
    }
    lists = {place: value for place, value in said.items() if _is_list(value)}
    broken = {place: value for place, value in said.items() if place not in lists}
    problems = []
    if broken:
        place, value = next(iter(broken.items()))
        message = f"{place} is {shown(value)}; needed is a list of strings."
        problems.append(found("Q04", list(broken), message))
    elif len({frozenset(value) for value in lists.values()}) > 1:
        first, *others = lists
        other = next(place for place in others if set(lists[place]) != set(lists[first]))
        odd = sorted(set(lists[first]) ^ set(lists[other]))
        message = f"{len(odd)} entries are in one list only, of {first} and {other}: {odd[0]!r}."
        problems.append(found("Q04", [first, other], message))
    first_block = next(iter(blocks))
    if not any(place.startswith(first_block) for place in said) and not (
        first_block.startswith(HF_QUANT_CONFIG_NAME) or "quantization." in first_block
    ):
        # The flat form reads no list as an empty one; the nested form is refused (Q02).
        lists = {f"{first_block}.ignore": [], **lists}
    # Of a list that is none, engines make nothing; the other file's is not read then.
    usable = {place: value for place, value in lists.items() if place.startswith(first_block)}
    return usable, problems


def _is_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _spelling(evidence: Evidence, entries: Sequence[str], told: set[str]) -> Iterator[Finding]:
    """Q10, Q13 and Q19: entries that do what they should, but not everywhere or not for long."""
    place = next(iter(_blocks(evidence)))
    foreign = [entry for entry in entries if is_in_memory(entry)]
    if foreign:
        message = f'"{foreign[0]}" is a name of modules in memory, not of a checkpoint.'
        yield found("Q19", foreign, message)
    spelled = any("shared_expert" in entry.replace("shared_expert_gate", "") for entry in entries)
    has_shared = any(
        f".{SHARED_EXPERTS}" in name and info.dtype in PLAIN_DTYPES
        for name, info in evidence.tensors.items()
    )
    if has_shared and entries and not spelled and "Q11" not in told:
        yield found("Q10", place, "no entry of the exclude list spells out shared_experts.")
    yield from _routers(evidence, entries, place)


def _routers(evidence: Evidence, entries: Sequence[str], place: str) -> Iterator[Finding]:
    config = evidence.config
    assert config is not None
    named = {int(match[1]) for entry in entries if (match := ROUTER_ENTRY.fullmatch(entry))}
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_sparse(layer)]
    covered = re.compile(r"model\.layers\.(\d+)\.?\*")
    whole = {int(match[1]) for entry in entries if (match := covered.fullmatch(entry))}
    lacking = [layer for layer in layers if layer not in named | whole]
    producer = (evidence.quantization or evidence.hf_quant or {}).get("producer")
    version = str(producer.get("version")) if isinstance(producer, dict) else ""
    is_old = version == OMITS_ROUTERS or version.startswith(f"{OMITS_ROUTERS}.")
    if lacking and (named or is_old):
        names = [layer_name(layer, "mlp.gate") for layer in lacking]
        message = f"{len(lacking)} of {len(layers)} routers are not in {place}'s list."
        yield found("Q13", names, message)


# ---- KV cache and recipe


def _kv_names(evidence: Evidence) -> Iterator[Finding]:
    """Q17."""
    names = [
        name
        for name in evidence.tensors
        if KV_SCALE.fullmatch(name) and not LOADED_KV_SCALE.fullmatch(name)
    ]
    if names:
        yield found("Q17", names, f"no engine loads {names[0]}.")


def _recipe(evidence: Evidence) -> Iterator[Finding]:
    """Q18."""
    if RECIPE_NAME not in evidence.files.sizes:
        return
    try:
        recipe = yaml.safe_load(evidence.text(RECIPE_NAME))
    except yaml.YAMLError:
        yield found("Q18", RECIPE_NAME, "it is not YAML.")
        return
    lists = [set(map(str, one)) for one in _ignored(recipe)]
    ours = next(
        (evidence.quantization[key] for key in LIST_KEYS if key in evidence.quantization), []
    )
    if lists and _is_list(ours) and set(ours) not in lists:
        odd = sorted(set(ours) ^ lists[0])
        message = f"its ignore list differs from config.json's in {len(odd)} entries: {odd[0]!r}."
        yield found("Q18", RECIPE_NAME, message)


def _ignored(value: Any) -> Iterator[list[object]]:
    """Every list under a key "ignore", at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "ignore" and isinstance(inner, list):
                yield inner
            else:
                yield from _ignored(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _ignored(inner)
