"""The MTP layer: is it whole, plain, and the model's own? Rules M02, M03, M05, M06 and M08.

Whether there is one: M01 and M10 (architecture.py); whether engines know that it is BF16: M04 and
Q09 (exclusion.py). Imports no torch.
"""

import re
from collections.abc import Iterator

from fourge.checkpoint.names import FUSED_DOWN, FUSED_GATE_UP, Role, layer_name
from fourge.doctor.evidence import MODEL_CARD, Evidence, same
from fourge.doctor.findings import Finding, found
from fourge.doctor.sharing import INDEXER, KEY_BIAS, PLAIN_DTYPES
from fourge.models.tensors import layer_shapes

RULES = ("M02", "M03", "M05", "M06", "M08")
# Of the MTP layer -> of the model, which GLM's MTP layer uses instead of its own.
OWN_PARTS = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}
MTP_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]*-MTP\b")


def check_mtp(evidence: Evidence) -> Iterator[Finding]:
    """All of RULES."""
    config = evidence.config
    assert config is not None
    for layer in config.mtp_layers:
        yield from _incomplete(evidence, layer)
        yield from _quantized(evidence, layer)
        if config.model_type.startswith("glm"):
            yield from _own_parts(evidence, layer)
    if not config.mtp_layers and not evidence.raw.get("num_nextn_predict_layers"):
        named = MTP_REPOSITORY.search(evidence.text(MODEL_CARD))
        if named is not None:
            message = f"there is no MTP layer here; the model card names {named[0]}."
            yield found("M08", MODEL_CARD, message)


def _incomplete(evidence: Evidence, layer: int) -> Iterator[Finding]:
    """M02, or X01 where all that is missing is the indexer."""
    assert evidence.config is not None
    own = evidence.suffixes.get(layer, set())
    expected = layer_shapes(evidence.config, layer).keys() - {KEY_BIAS}  # X09
    if own.intersection((FUSED_GATE_UP, FUSED_DOWN)):
        expected = {suffix for suffix in expected if not suffix.startswith("mlp.experts.")}
    missing = expected - own
    for expert, projections in evidence.by_layer.get(layer, {}).items():
        for projection in projections.values():
            parts = ("weight_scale", "weight_scale_2") if projection.is_packed else ()
            prefix = f"mlp.experts.{expert}.{projection.name}."
            missing |= {prefix + part for part in parts if prefix + part not in own}
    if not missing or evidence.is_unclear:
        return
    names = sorted(layer_name(layer, suffix) for suffix in missing)
    is_indexer = missing == {suffix for suffix in expected if suffix.startswith(INDEXER)}
    message = f"{len(missing):,} of {len(expected):,} tensors of the MTP layer are missing."
    yield found("X01" if is_indexer else "M02", names, message)


def _quantized(evidence: Evidence, layer: int) -> Iterator[Finding]:
    """M05 and M06."""
    experts = [
        projection.tensor()
        for own in evidence.by_layer.get(layer, {}).values()
        for projection in own.values()
        if projection.is_packed
    ]
    if experts:
        message = f"{len(experts):,} projections of layer {layer}'s experts are NVFP4."
        yield found("M05", experts, message)
    plain = [
        name
        for name, parsed in evidence.names.items()
        if parsed is not None
        and parsed.layer == layer
        and parsed.role == Role.MTP
        and evidence.tensors[name].dtype not in PLAIN_DTYPES
    ]
    if plain:
        message = f"{plain[0]} is {evidence.tensors[plain[0]].dtype}; needed is BF16."
        yield found("M06", plain, message)


def _own_parts(evidence: Evidence, layer: int) -> Iterator[Finding]:
    """M03."""
    different = []
    for suffix, shared in OWN_PARTS.items():
        own = evidence.tensors.get(layer_name(layer, suffix))
        theirs = evidence.tensors.get(shared)
        if own is not None and theirs is not None and not same(evidence, own, theirs):
            different.append(own.name)
    if different:
        message = "it is not the model's; GLM's MTP layer has none of its own."
        yield found("M03", different, message)
