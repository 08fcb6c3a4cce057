"""Single keys of config.json: rules C01, C02, C06, C10, C12 and M11. Imports no torch.

Some values only a source can judge (a scale, a rope base); without one, what contradicts itself or
the whole family is named. Defaults of engines: vllm 0.33.0 deepseek_v2.py:327, 387.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fourge.doctor.correction import Correction, key_of, list_values, shown
from fourge.doctor.evidence import Evidence, JsonObject
from fourge.doctor.findings import Finding, found
from fourge.doctor.sharing import SHARING_KEYS
from fourge.models.config import ModelConfig

# Routing: what every model of these families has, and what a key means that is absent.
ROUTING = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
# GLM's factors; a deepseek_v3 may be Kimi's.
FACTORS = {"glm_moe_dsa": 2.5, "glm4_moe_lite": 1.8}
ROUTING_DEFAULTS = {**ROUTING, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1}
# Published without the key; engines know the family.
NOT_PUBLISHED = {("glm4_moe_lite", "scoring_func")}
# rope_theta -> max_position_embeddings of GLM-5 and 5.1, and of 5.2 and 5.3
GLM_5_ROPE: dict[Any, int] = {1_000_000: 202_752, 8_000_000: 1_048_576}
RULES = ("C10", "M11")
EPS = {"glm_moe_dsa": 1e-5, "glm4_moe_lite": 1e-5, "deepseek_v3": 1e-6, "deepseek_v32": 1e-6}
# Values of layer_types that releases of transformers before 5.18 know too.
LAYER_TYPES = {"full_attention", "deepseek_sparse_attention"}
SHARED_ITERATIONS = "index_share_for_mtp_iteration"
# May differ from the source's: what quantizing adds, and what --mtp drop demands.
MAY_DIFFER = {"quantization_config", "num_nextn_predict_layers"}

ROPE_KEYS = ("rope_theta", "rope_parameters", "rope_scaling", "max_position_embeddings")
# Rules that explain other values of all these keys.
KEYS_OF = {"C01": ROPE_KEYS} | {f"X0{number}": SHARING_KEYS for number in range(1, 7)}


def check_routing(raw: JsonObject, evidence: Evidence) -> Iterator[Correction]:
    """C02: keys that engines have other defaults for."""
    theirs = _source(evidence)
    wrong: dict[str, str] = {}
    keys: JsonObject = {}
    for key, default in ROUTING_DEFAULTS.items():
        value, wanted = raw.get(key), theirs.get(key, ROUTING.get(key))
        if key == "routed_scaling_factor" and value == default and not theirs:
            wanted = FACTORS.get(str(raw.get("model_type")))
        optional = (raw.get("model_type"), key) in NOT_PUBLISHED or (theirs and wanted is None)
        if value is None and not optional:
            wrong[key] = f"{key} is missing"
        elif value is not None and wanted is not None and value != wanted:
            wrong[key] = f"{key} is {shown(value)}, needed is {shown(wanted)}"
        if key in wrong:
            keys[key] = default if wanted is None else wanted
    if wrong:
        message = f"{'; '.join(wrong.values())}."
        yield Correction(found("C02", [key_of(key) for key in wrong], message), keys)


def check_rope(raw: JsonObject, evidence: Evidence) -> Iterator[Correction]:
    """C01: one rope, said once, and a context length that goes with it."""
    parameters, scaling = raw.get("rope_parameters"), raw.get("rope_scaling")
    if (
        isinstance(parameters, dict)
        and isinstance(scaling, dict)
        and _rope(parameters) != _rope({"rope_theta": parameters.get("rope_theta")} | scaling)
    ):
        message = "rope_scaling stands beside rope_parameters and says something else."
        yield Correction(found("C01", key_of("rope_scaling"), message), {"rope_scaling": None})
        return
    top = raw.get("rope_theta")
    inner = parameters.get("rope_theta") if isinstance(parameters, dict) else None
    if top is not None and inner is not None and top != inner:
        message = f"rope_theta is {top}, rope_parameters say {inner}."
        yield Correction(found("C01", key_of("rope_theta"), message), {"rope_theta": None})
        return
    theta, longest = _theta(raw), raw.get("max_position_embeddings")
    theirs = _source(evidence)
    if theirs:
        yield from _against_source(raw, theirs)
    elif longest in GLM_5_ROPE.values() and GLM_5_ROPE.get(theta, longest) != longest:
        message = f"rope_theta {theta} and max_position_embeddings {longest} are not of one model."
        places = [key_of("rope_theta"), key_of("max_position_embeddings")]
        yield Correction(found("C01", places, message), {})


def _against_source(raw: JsonObject, theirs: Mapping[str, Any]) -> Iterator[Correction]:
    values = {
        "rope_theta": (_theta(raw), _theta(theirs)),
        "rope_scaling": (_scaling(raw), _scaling(theirs)),
        "max_position_embeddings": (
            raw.get("max_position_embeddings"), theirs.get("max_position_embeddings")
        ),
    }  # fmt: skip
    wrong = {key: pair for key, pair in values.items() if pair[0] != pair[1]}
    if wrong:
        told = [f"{key} is {shown(a)}, the source has {shown(b)}" for key, (a, b) in wrong.items()]
        keys = {key: theirs.get(key) for key in ROPE_KEYS}
        message = f"{'; '.join(told)}."
        yield Correction(found("C01", [key_of(key) for key in wrong], message), keys)


def _theta(raw: Mapping[str, Any]) -> object:
    parameters = raw.get("rope_parameters")
    inner = parameters.get("rope_theta") if isinstance(parameters, dict) else None
    return raw.get("rope_theta") if inner is None else inner


def _scaling(raw: Mapping[str, Any]) -> JsonObject:
    """What rope_parameters or rope_scaling say beyond the base."""
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(raw.get(key), dict):
            return {key: value for key, value in _rope(raw[key]).items() if key != "rope_theta"}
    return {}


def _rope(value: JsonObject) -> JsonObject:
    """An object of rope settings without its two spellings of a type; "default" is no type."""
    kind = value.get("rope_type") or value.get("type")
    rest = {key: item for key, item in value.items() if key not in ("type", "rope_type")}
    return rest | ({"rope_type": kind} if kind not in (None, "default") else {})


def check_layer_types(raw: JsonObject, evidence: Evidence) -> Iterator[Correction]:
    """C06 without a source: the mark of a config that transformers has written anew."""
    types = raw.get("layer_types")
    odd = set(map(str, types)) - LAYER_TYPES if isinstance(types, list) else set()
    if odd:
        told = list_values(sorted(odd))
        message = f"layer_types holds {told}: transformers has written config.json anew."
        finding = found("C06", key_of("layer_types"), message)
        # With a source, whatever differs is named at once: check_settings.
        yield Correction(None if _source(evidence) else finding, {"layer_types": None})


def check_settings(evidence: Evidence, before: Sequence[Finding]) -> Iterator[Finding]:
    """C06, C10, C12 and M11 on a config that can be understood; ``before``: what check_architecture
    found, whose keys are not named again.
    """
    raw, theirs, config = evidence.raw, _source(evidence), evidence.config
    assert config is not None
    eps, wanted = raw.get("rms_norm_eps"), EPS[config.model_type]
    wanted = theirs.get("rms_norm_eps", wanted)
    told: dict[str, Finding] = {}
    if eps != wanted:
        owner = "the source's" if theirs else "the family's"
        message = f"rms_norm_eps is {eps}; {owner} is {wanted}."
        told["rms_norm_eps"] = found("C12", key_of("rms_norm_eps"), message)
    if config.uses_dsa:
        told |= _iterations(raw, theirs, "shared" in config.indexer_types)
    skipped = {place.removeprefix(key_of("")) for one in before for place in one.places}
    skipped |= {*told, *MAY_DIFFER, *(key for one in before for key in KEYS_OF.get(one.rule, ()))}
    drift = [
        key
        for key in dict.fromkeys([*theirs, *raw])
        if theirs and key not in skipped and theirs.get(key) != raw.get(key)
    ]
    yield from told.values()
    if drift == ["head_dim"] or (not theirs and _is_odd(raw.get("head_dim"), config)):
        message = f"head_dim is {raw.get('head_dim')}, not as published; no engine reads it."
        yield found("C10", key_of("head_dim"), message)
    elif drift:
        changes = [f"{key} {shown(theirs.get(key))} -> {shown(raw.get(key))}" for key in drift[:4]]
        message = f"config.json differs from the source's: {'; '.join(changes)}."
        yield found("C06", [key_of(key) for key in drift], message)


def _is_odd(head_dim: object, config: ModelConfig) -> bool:
    usual = (None, config.qk_rope_head_dim, config.qk_nope_head_dim, config.qk_head_dim)
    return head_dim not in usual


def _iterations(raw: JsonObject, theirs: Mapping[str, Any], is_shared: bool) -> dict[str, Finding]:
    """M11: whether drafts share a selection as the layers do."""
    value = raw.get(SHARED_ITERATIONS)
    if theirs and bool(value) != bool(theirs.get(SHARED_ITERATIONS)):
        message = f"it is {shown(value)}; the source has {shown(theirs.get(SHARED_ITERATIONS))}."
    elif not theirs and value and not is_shared:
        message = "it is true, but every layer has an indexer of its own: an approximation."
    elif not theirs and value is False and is_shared:
        message = "it is false, but layers share selections: the model was trained to share."
    else:
        return {}
    return {SHARED_ITERATIONS: found("M11", key_of(SHARED_ITERATIONS), message)}


def _source(evidence: Evidence) -> Mapping[str, Any]:
    """The source's config.json, {} without one."""
    return evidence.source.raw if evidence.source else {}
