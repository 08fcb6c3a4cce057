"""Do tensors have the dtypes and shapes that config and format ask for? Rules D and C09.

Shapes come from models/tensors.py and formats/layout.py. Tensors of the indexer and the MTP layer's
own have rules for their dtypes elsewhere (X09, X10, M06), modules that engines may quantize in
exclusion.py. What FP8 left over is K10, an empty tensor K08. Imports no torch.
"""

from collections import Counter
from collections.abc import Collection, Iterator

import numpy as np

from fourge.checkpoint.header import TensorInfo
from fourge.checkpoint.names import PROJECTIONS, Role
from fourge.doctor.correction import key_of, list_values
from fourge.doctor.evidence import CORRECTION_BIAS, Evidence, Projection
from fourge.doctor.files import read_tensors
from fourge.doctor.findings import Finding, found
from fourge.doctor.sharing import PLAIN_DTYPES
from fourge.formats.layout import BLOCK_SIZE, packed_shape, scale_shape
from fourge.models.config import ModelConfig
from fourge.models.tensors import expected_tensors, projection_shape

RULES = ("C09", "D01", "D02", "D03", "D04", "D05", "D06")
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
# Roles of which an engine never builds a quantized module.
NEVER_QUANTIZED = {Role.EMBEDDING, Role.FINAL_NORM, Role.NORM, Role.ROUTER}
NORMS = ("q_a_layernorm.weight", "kv_a_layernorm.weight")
F16_LOST_BITS = 0x1FFF  # of a float32's fraction; BF16 loses these and three more
FORMATS = {"U8": "NVFP4", "I8": "NVFP4", "F8_E4M3": "FP8", "F8_E5M2": "FP8"}


def check_shapes(evidence: Evidence) -> Iterator[Finding]:
    """All of RULES."""
    config = evidence.config
    assert config is not None
    yield from _vocabulary(evidence, config)
    yield from _correction_biases(evidence)
    yield from _never_quantized(evidence)
    yield from _group_size(evidence)
    mixed = {projection.tensor(): projection for projection in _mixed(evidence)}
    if mixed:
        layers = sorted({projection.layer for projection in mixed.values()})
        kinds = sorted({format_of(projection) for projection in mixed.values()})
        message = f"layers {list_values(layers[:6])} mix formats: {', '.join(kinds)} beside others."
        yield found("D05", list(mixed), message)
    odd = [
        key
        for key in ("hidden_size", "moe_intermediate_size")
        if getattr(config, key) % BLOCK_SIZE and evidence.quantized_layers()
    ]
    if odd:
        told = ", ".join(f"{key} is {getattr(config, key)}" for key in odd)
        yield found("D06", [key_of(key) for key in odd], f"{told}.")
    else:
        yield from _shapes(evidence, config, mixed)


def _vocabulary(evidence: Evidence, config: ModelConfig) -> Iterator[Finding]:
    """C09."""
    rows = {
        name: evidence.tensors[name].shape[0]
        for name in VOCABULARY
        if name in evidence.tensors and evidence.tensors[name].nbytes
    }
    wrong = {name: count for name, count in rows.items() if count != config.vocab_size}
    if wrong:
        told = ", ".join(f"{name} has {count:,} rows" for name, count in wrong.items())
        yield found("C09", list(wrong), f"vocab_size is {config.vocab_size:,}; {told}.")


def _correction_biases(evidence: Evidence) -> Iterator[Finding]:
    """D01: the dtype, and whether the values are numbers that have never been in 16 bits."""
    biases = [
        info
        for name, info in evidence.tensors.items()
        if name.endswith(CORRECTION_BIAS) and info.nbytes
    ]
    recast = [info.name for info in biases if info.dtype != "F32"]
    plain = [info for info in biases if info.dtype == "F32"]
    values = [(info.name, data) for info, data in read_tensors(evidence.files, plain)]
    collapsed = [name for name, data in values if is_collapsed(data)]
    broken = [name for name, data in values if not np.isfinite(np.frombuffer(data, "<f4")).all()]
    if recast:
        dtype = next(info.dtype for info in biases if info.dtype != "F32")
        yield found("D01", recast, f"{len(recast)} correction biases are {dtype}.")
    if collapsed:
        message = f"every value of {len(collapsed)} correction biases is one of BF16 or F16."
        yield found("D01", collapsed, message)
    if broken:
        yield found("D01", broken, f"{len(broken)} correction biases hold NaN or infinity.")


def is_collapsed(data: bytes) -> bool:
    """Whether float32 values have no more bits than BF16 or F16 holds. Zeros, of a model that was
    never balanced, are left out, and a single expert.
    """
    bits = np.frombuffer(data, np.uint32)
    return len(bits) > 1 and bool(bits.any()) and not (bits & F16_LOST_BITS).any()


def _never_quantized(evidence: Evidence) -> Iterator[Finding]:
    """D02."""
    names = [
        name
        for name, parsed in evidence.names.items()
        if parsed is not None
        and (parsed.role in NEVER_QUANTIZED or name.endswith(NORMS))
        and not name.endswith(CORRECTION_BIAS)
        and evidence.tensors[name].dtype not in PLAIN_DTYPES
        and not evidence.is_fp8_leftover(name)
    ]
    if names:
        message = f"{names[0]} is {evidence.tensors[names[0]].dtype}; needed is BF16."
        yield found("D02", names, message)


def _group_size(evidence: Evidence) -> Iterator[Finding]:
    """D04 in the metadata; for the tensors themselves see _shapes."""
    flat = evidence.quantization
    groups = flat.get("config_groups")
    sizes = {key_of("quantization_config.group_size"): flat.get("group_size")}
    for group, value in groups.items() if isinstance(groups, dict) else ():
        for part in ("weights", "input_activations"):
            scheme = value.get(part) if isinstance(value, dict) else None
            if isinstance(scheme, dict):
                place = key_of(f"quantization_config.config_groups.{group}.{part}.group_size")
                sizes[place] = scheme.get("group_size")
    sizes[key_of("group_size", "hf_quant_config.json")] = evidence.nested.get("group_size")
    inner = flat.get("quantization")
    if isinstance(inner, dict):
        sizes[key_of("quantization_config.quantization.group_size")] = inner.get("group_size")
    wrong = {place: size for place, size in sizes.items() if size not in (None, BLOCK_SIZE)}
    if wrong and evidence.quantized_layers():
        place, size = next(iter(wrong.items()))
        yield found("D04", list(wrong), f"{place} is {size!r}; needed is {BLOCK_SIZE}.")


def format_of(projection: Projection) -> str:
    """NVFP4, FP8, or the dtype of the weight; "" where there is none."""
    weight = projection.parts.get("weight")
    return FORMATS.get(weight.dtype, weight.dtype) if weight is not None and weight.nbytes else ""


def _mixed(evidence: Evidence) -> Iterator[Projection]:
    """Of every layer's experts, the projections whose format is not that of most."""
    for experts in evidence.by_layer.values():
        own = [
            (format_of(projection), projection)
            for projections in experts.values()
            for projection in projections.values()
            if format_of(projection)
        ]
        usual = Counter(kind for kind, _ in own).most_common(1)
        yield from (one for kind, one in own if kind != usual[0][0])


def _shapes(evidence: Evidence, config: ModelConfig, mixed: Collection[str]) -> Iterator[Finding]:
    """D03, and D04 where block scales are those of larger blocks."""
    wrong: dict[str, str] = {}
    larger: dict[str, str] = {}
    for info, dtype, shape in _expected(evidence, config, mixed):
        is_scalar = not shape and info.shape in ((), (1,))
        if not info.nbytes or (info.dtype == dtype and (info.shape == shape or is_scalar)):
            continue
        told = f"{info.dtype} {list(info.shape)}, needed is {dtype} {list(shape)}"
        is_scale = info.name.endswith("weight_scale") and info.dtype == dtype
        if is_scale and info.shape[:-1] == shape[:-1] and 0 < info.shape[-1] < shape[-1]:
            larger[info.name] = told
        else:
            wrong[info.name] = told
    # Where the codes have another shape too, it is not the blocks.
    wrong |= {name: told for name, told in larger.items() if name.removesuffix("_scale") in wrong}
    larger = {name: told for name, told in larger.items() if name not in wrong}
    for rule, told in (("D03", wrong), ("D04", larger)):
        if told:
            name = next(iter(told))
            yield found(rule, list(told), f"{len(told):,} tensors; {name} is {told[name]}.")


def _expected(
    evidence: Evidence, config: ModelConfig, mixed: Collection[str]
) -> Iterator[tuple[TensorInfo, str, tuple[int, ...]]]:
    """(tensor, dtype, shape) that it should have, of all that are there."""
    shapes = {projection: projection_shape(config, projection) for projection in PROJECTIONS}
    for projection in evidence.experts.values():
        name = projection.tensor()
        if name in mixed or evidence.is_fp8_leftover(name):
            continue
        weight = projection.parts.get("weight")
        shape = shapes[projection.name]
        if weight is not None and not projection.is_packed and weight.dtype in PLAIN_DTYPES:
            yield weight, weight.dtype, shape
            continue
        wanted = {
            "weight": ("U8", packed_shape(shape)),
            "weight_scale": ("F8_E4M3", scale_shape(shape)),
            "weight_scale_2": ("F32", ()),
            "input_scale": ("F32", ()),
        }
        for part, info in projection.parts.items():
            yield info, *wanted[part]
    routers_differ = evidence.raw.get("n_routed_experts") != config.n_routed_experts  # C04
    for name, shape in _plain_shapes(evidence, config).items():
        info = evidence.tensors.get(name)
        if info is None or info.dtype not in PLAIN_DTYPES:
            continue
        if routers_differ and ".mlp.gate." in name:
            continue
        # F32 holds every BF16 value; F16 does not.
        recast = info.dtype == "F16" and evidence.raw.get("dtype", "bfloat16") == "bfloat16"
        yield info, "BF16" if recast else info.dtype, shape


def _plain_shapes(evidence: Evidence, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything but routed experts; rows of the vocabulary are C09's."""
    shapes = {
        name: shape
        for name, shape in expected_tensors(config).items()
        if ".mlp.experts." not in name
    }
    for name in set(VOCABULARY) & evidence.tensors.keys() & shapes.keys():
        shapes[name] = (*evidence.tensors[name].shape[:1], config.hidden_size)
    return shapes
