"""Does config.json describe the model whose tensors these are? Rules C03-C05, C12, M01, M09, M10.

``check_architecture`` goes through the config key by key, with the rules of settings.py and
sharing.py in between; each finding brings the values that the files speak for, so that later rules
go on with a config that fits: ``evidence.corrected`` and ``evidence.config``. Imports no torch.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from fourge.checkpoint.metadata import CONFIG_NAME
from fourge.checkpoint.names import Role
from fourge.doctor.correction import Correction, key_of, list_values, shown
from fourge.doctor.evidence import Evidence, JsonObject
from fourge.doctor.findings import Finding, found
from fourge.doctor.settings import check_layer_types, check_rope, check_routing
from fourge.doctor.sharing import (
    PATTERN,
    TYPES,
    check_interleave,
    check_sharing,
    sharing_on_disk,
)
from fourge.errors import CheckpointError, ConfigError
from fourge.models import config as model_config
from fourge.models.config import ARCHITECTURES, DSA_FAMILIES

RULES = ("C01", "C02", "C03", "C04", "C05", "C12", "M01", "M09", "M10",
         "X02", "X03", "X04", "X05", "X06", "X07")  # fmt: skip
MTP_KEY = "num_nextn_predict_layers"
# Weights that only an MTP layer has.
MTP_PARTS = ("eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.norm.weight")
MLA_WEIGHT = "self_attn.kv_a_proj_with_mqa.weight"


def check_architecture(evidence: Evidence) -> Iterator[Finding]:
    """Rules of RULES, and C06 for a config that nobody can read; sets what the head says."""
    if evidence.raw_problem is not None:
        yield found("C06", CONFIG_NAME, f"config.json cannot be used: {evidence.raw_problem}.")
        if not evidence.raw:
            return
    raw = dict(evidence.raw)
    for check in CHECKS:
        for correction in check(raw, evidence):
            if correction.finding is not None:
                yield correction.finding
            for key, value in correction.keys.items():
                raw.pop(key, None) if value is None else raw.update({key: value})
    evidence.corrected = raw
    try:
        evidence.config = model_config.from_dict(raw)
    except ConfigError as error:
        yield found("C06", CONFIG_NAME, str(error))


def _family(raw: JsonObject, evidence: Evidence) -> Iterator[Correction]:
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    classes = architectures if isinstance(architectures, list) else []
    theirs = evidence.source.raw.get("model_type") if evidence.source else None
    fitting = theirs if theirs in ARCHITECTURES else _fitting_family(raw, evidence, classes)
    if fitting is None:
        raise CheckpointError(
            f"{evidence.files.place} has model_type {model_type!r}; fourge examines"
            f" {', '.join(ARCHITECTURES)}: give a checkpoint of one of these families."
        )
    keys: JsonObject = {"model_type": fitting, "architectures": [ARCHITECTURES[fitting]]}
    wrong = [key for key, value in keys.items() if raw.get(key) != value]
    if wrong == ["architectures"] and not architectures:
        return  # model_type alone is enough for every engine
    if wrong:
        told = ", ".join(f"{key} is {shown(raw.get(key))}" for key in wrong)
        message = f"{told}; the rest is of a {fitting}."
        yield Correction(found("C05", [key_of(key) for key in wrong], message), keys)


def _fitting_family(raw: JsonObject, evidence: Evidence, classes: Collection[object]) -> str | None:
    """The family that config, tensors and tokenizer agree on best; None if it is none of ours."""
    named = [kind for kind, name in ARCHITECTURES.items() if name in classes]
    if raw.get("model_type") in ARCHITECTURES:
        named.append(raw["model_type"])
    suffixes = {parsed.suffix for parsed in evidence.names.values() if parsed is not None}
    if not named and MLA_WEIGHT not in suffixes:
        return None
    indexed = any(suffix.startswith("self_attn.indexer.") for suffix in suffixes)
    is_glm = "[gMASK]" in evidence.special_tokens or raw.get("indexer_rope_interleave") is True
    families = [kind for kind in ARCHITECTURES if not is_glm or kind.startswith("glm")]
    if evidence.tensors and not evidence.damaged:
        families = [kind for kind in families if (kind in DSA_FAMILIES) == indexed]
    # What architectures say first: launchers rewrite model_type.
    return next((kind for kind in [*named, *families] if kind in families), None)


def _router_dtype(raw: JsonObject, evidence: Evidence) -> Iterator[Correction]:
    value = raw.get("moe_router_dtype")
    if value is not None and value != "float32":
        message = f"moe_router_dtype is {value!r}; needed is 'float32', or nothing."
        yield Correction(
            found("M09", key_of("moe_router_dtype"), message), {"moe_router_dtype": "float32"}
        )


def _layers(raw: JsonObject, evidence: Evidence) -> Iterator[Correction]:
    """num_hidden_layers, against the layers on disk."""
    count, suffixes = raw.get("num_hidden_layers"), evidence.suffixes
    if not isinstance(count, int) or not suffixes:
        return
    mtp = [layer for layer, own in suffixes.items() if _is_mtp(own)]
    if mtp:
        number = min(mtp)
        told = f"layer {number} is the MTP layer"
    else:
        number = max(suffixes) + 1
        told = f"there are {number} layers on disk"
        # More layers than announced, whole ones; fewer are missing tensors.
        if number <= count or raw.get(MTP_KEY) or MLA_WEIGHT not in suffixes[number - 1]:
            return
    if number == count or not number or evidence.is_unclear:
        return
    message = f"num_hidden_layers is {count}, but {told}."
    kinds = ["dense" if _is_dense(suffixes.get(i, set())) else "sparse" for i in range(number)]
    keys: JsonObject = {"num_hidden_layers": number}
    if raw.get("mlp_layer_types") is not None:
        keys["mlp_layer_types"] = kinds
    if raw.get(TYPES) is not None or raw.get(PATTERN) is not None:
        keys |= sharing_on_disk(evidence, number)
    yield Correction(found("C12", key_of("num_hidden_layers"), message), keys)


def _mtp_count(raw: JsonObject, evidence: Evidence) -> Iterator[Correction]:
    """M01 and M10: num_nextn_predict_layers, against the layers after the last."""
    count, value = raw.get("num_hidden_layers"), raw.get(MTP_KEY)
    if not isinstance(count, int):
        return
    beyond = {layer: own for layer, own in evidence.suffixes.items() if layer >= count}
    is_there = count in beyond if value == 1 else any(map(_is_mtp, beyond.values()))
    fitting = 1 if is_there else 0
    if value not in (None, 0, 1) or isinstance(value, bool):
        if value == len(beyond) and all(map(_is_mtp, beyond.values())):
            fitting = value
        message = f"{MTP_KEY} is {shown(value)}; there are {len(beyond)} MTP layers."
        yield Correction(found("M10", key_of(MTP_KEY), message), {MTP_KEY: fitting})
    elif (value or 0) == fitting or evidence.is_unclear or not evidence.tensors:
        return
    elif is_there:
        message = f"{MTP_KEY} is {value}, but layer {min(beyond)} is an MTP layer."
        yield Correction(found("M01", key_of(MTP_KEY), message), {MTP_KEY: 1})
    else:
        message = f"{MTP_KEY} is {value}, but no tensor of layer {count} is there."
        yield Correction(found("M01", f"model.layers.{count}", message), {MTP_KEY: 0})


def _dense_layers(raw: JsonObject, evidence: Evidence) -> Iterator[Correction]:
    """first_k_dense_replace and mlp_layer_types, against the MLPs on disk."""
    count, suffixes = raw.get("num_hidden_layers"), evidence.suffixes
    if not isinstance(count, int) or isinstance(count, bool):
        return
    first, types = raw.get("first_k_dense_replace"), raw.get("mlp_layer_types")
    said: dict[str, list[str]] = {}
    if isinstance(types, list):
        said["mlp_layer_types"] = types
    if isinstance(first, int):
        said["first_k_dense_replace"] = ["dense" if i < first else "sparse" for i in range(count)]
    on_disk = dict(_kinds(suffixes, count))
    guess = next(iter(said.values()), [])
    kinds = [on_disk.get(i, guess[i] if i < len(guess) else "sparse") for i in range(count)]
    wrong = {key: _difference(own, kinds) for key, own in said.items() if own != kinds}
    number = kinds.index("sparse") if "sparse" in kinds else count
    if "sparse" in kinds and "dense" in kinds[number:]:
        wrong.pop("first_k_dense_replace", None)  # such a model is beyond that key
    if not wrong and said:
        return
    keys: JsonObject = {"first_k_dense_replace": number}
    if isinstance(types, list):
        keys["mlp_layer_types"] = kinds
    told = [f"{key} is {shown(raw.get(key))}, wrong for layer {i}" for key, i in wrong.items()]
    message = f"{'; '.join(told) or 'neither key is there'}, going by the tensors on disk."
    places = [key_of(key) for key in wrong or keys]
    yield Correction(found("C03", places, message), keys)


def _experts(raw: JsonObject, evidence: Evidence) -> Iterator[Correction]:
    """n_routed_experts, against ids on disk; an expert that some layers lack is K06."""
    said, count = raw.get("n_routed_experts"), raw.get("num_hidden_layers")
    if not isinstance(said, int) or not isinstance(count, int) or evidence.damaged:
        return
    numbers = {layer: max(own) + 1 for layer, own in evidence.by_layer.items() if layer < count}
    routers = {
        evidence.tensors[name].shape[0]
        for name, parsed in evidence.names.items()
        if parsed is not None
        and parsed.role == Role.ROUTER
        and parsed.suffix == "mlp.gate.weight"
        and evidence.tensors[name].shape
    }
    extra = [layer for layer, number in numbers.items() if number > said]
    consistent = len(set(numbers.values())) == 1
    if not extra and not (consistent and _is_pruned(numbers, said, routers)):
        return
    number = max(numbers.values())
    places = [f"model.layers.{layer}.mlp.experts" for layer in extra] or [
        key_of("n_routed_experts")
    ]
    message = (
        f"n_routed_experts is {said}; the experts on disk go up to number {number - 1}, the routers"
        f" have {list_values(sorted(routers))} rows."
    )
    keys = {"n_routed_experts": number} if consistent else {}
    yield Correction(found("C04", places, message), keys)


def _is_pruned(numbers: Mapping[int, int], said: int, routers: Collection[int]) -> bool:
    """Whether all layers lack the same experts. Of a single layer only the router can tell."""
    (number,) = set(numbers.values())
    return number < said and (len(numbers) > 1 or set(routers) == {number})


CHECKS: tuple[Callable[[JsonObject, Evidence], Iterator[Correction]], ...] = (
    _family, _router_dtype, _layers, _mtp_count, _dense_layers, _experts, check_routing,
    check_rope, check_layer_types, check_interleave, check_sharing,
)  # fmt: skip


def _kinds(suffixes: Mapping[int, set[str]], count: int) -> Iterator[tuple[int, str]]:
    """(layer, "dense" or "sparse") where the tensors tell."""
    for layer, own in suffixes.items():
        if layer < count and _is_dense(own):
            yield layer, "dense"
        elif layer < count and "mlp.gate.weight" in own:
            yield layer, "sparse"


def _is_mtp(suffixes: set[str]) -> bool:
    """One stray tensor does not make an MTP layer."""
    return len(suffixes.intersection(MTP_PARTS)) > 1


def _is_dense(suffixes: set[str]) -> bool:
    return "mlp.gate_proj.weight" in suffixes and "mlp.gate.weight" not in suffixes


def _difference(said: list[Any], kinds: list[str]) -> int:
    """The first layer for which two lists say different things."""
    pairs = zip(said, kinds, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(said), len(kinds)))
