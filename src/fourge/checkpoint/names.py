"""The one table: tensor name <-> role.

Every tensor of a checkpoint must match a line of the table; a name that does not is an error, since
a tensor that nobody recognises is a tensor that nobody checks. Names are the checkpoint's own
(GLM-5.1, DeepSeek-V3, GLM-4.7-Flash); ``model.layers.L.`` is written once, in ``LAYER_PREFIX``.
Routed experts may be stored one by one or fused in 3-D tensors (transformers 5 in memory);
``split_fused`` turns the second form into the first without moving a byte. Imports no torch.
"""

import re
from enum import StrEnum
from typing import NamedTuple

from fourge.checkpoint.header import TensorInfo
from fourge.errors import CheckpointError


class Role(StrEnum):
    """What a tensor is for; the values are what a person reads."""

    EMBEDDING = "embedding"
    FINAL_NORM = "final norm"
    LM_HEAD = "lm_head"
    NORM = "layer norms"
    ATTENTION = "attention"
    INDEXER = "indexer"
    DENSE_MLP = "dense MLP"
    ROUTER = "router"
    SHARED_EXPERT = "shared experts"
    ROUTED_EXPERT = "routed experts"
    MTP = "MTP projections and norms"


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LAYER_PREFIX = "model.layers.{layer}."
EXPERT_PREFIX = "mlp.experts.{expert}.{projection}."

FUSED_GATE_UP = "mlp.experts.gate_up_proj"
FUSED_DOWN = "mlp.experts.down_proj"

_GLOBAL = {
    "model.embed_tokens.weight": Role.EMBEDDING,
    "model.norm.weight": Role.FINAL_NORM,
    "lm_head.weight": Role.LM_HEAD,
}

# Patterns of what follows "model.layers.L."
_LAYER = {
    # First, since nearly all names of a large model are these.
    r"mlp\.experts\.(?P<expert>\d+)\.(?P<projection>gate_proj|up_proj|down_proj)"
    r"\.(?P<part>weight|weight_scale|weight_scale_2|input_scale)": Role.ROUTED_EXPERT,
    r"(input|post_attention)_layernorm\.weight": Role.NORM,
    r"self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)\.weight": (
        Role.ATTENTION
    ),
    r"self_attn\.(q_a|kv_a)_layernorm\.weight": Role.ATTENTION,
    r"self_attn\.rotary_emb\.inv_freq": Role.ATTENTION,
    r"self_attn\.indexer\.(wq_b|wk|weights_proj)\.weight": Role.INDEXER,
    r"self_attn\.indexer\.k_norm\.(weight|bias)": Role.INDEXER,
    r"mlp\.(gate|up|down)_proj\.weight": Role.DENSE_MLP,
    r"mlp\.gate\.(weight|e_score_correction_bias)": Role.ROUTER,
    r"mlp\.shared_experts\.(gate|up|down)_proj\.weight": Role.SHARED_EXPERT,
    r"mlp\.experts\.(gate_up_proj|down_proj)": Role.ROUTED_EXPERT,
    r"(eh_proj|enorm|hnorm|shared_head\.norm|shared_head\.head|embed_tokens)\.weight": Role.MTP,
}

_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")
_COMPILED = tuple((re.compile(pattern), role) for pattern, role in _LAYER.items())


class TensorName(NamedTuple):
    """A parsed name; ``suffix`` follows ``model.layers.L.``; outside layers it is the name."""

    role: Role
    layer: int | None
    suffix: str
    expert: int | None = None
    projection: str | None = None
    part: str | None = None


def find(name: str) -> TensorName | None:
    """The table's entry for ``name``, or None if the table does not know it."""
    if name in _GLOBAL:
        return TensorName(_GLOBAL[name], None, name)
    in_layer = _LAYER_NAME.fullmatch(name)
    if in_layer is None:
        return None
    layer, suffix = int(in_layer[1]), in_layer[2]
    for pattern, role in _COMPILED:
        if match := pattern.fullmatch(suffix):
            groups = match.groupdict()
            expert = int(groups["expert"]) if "expert" in groups else None
            projection, part = groups.get("projection"), groups.get("part")
            return TensorName(role, layer, suffix, expert, projection, part)
    return None


def parse(name: str) -> TensorName:
    """The table's entry for ``name``; CheckpointError if there is none."""
    found = find(name)
    if found is None:
        raise CheckpointError(
            f"tensor {name} is not in fourge's name table; this is not a checkpoint of a supported"
            " family, or a tensor was added to it: remove it, or report the name."
        )
    return found


def layer_name(layer: int, suffix: str) -> str:
    """``model.layers.<layer>.<suffix>``."""
    return LAYER_PREFIX.format(layer=layer) + suffix


def expert_name(layer: int, expert: int, projection: str, part: str = "weight") -> str:
    """The full name of one tensor of a routed expert's projection."""
    return layer_name(layer, expert_suffix(expert, projection, part))


def expert_suffix(expert: int, projection: str, part: str = "weight") -> str:
    """The name of one tensor of a routed expert's projection, within its layer."""
    return EXPERT_PREFIX.format(expert=expert, projection=projection) + part


def split_fused(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Replace fused expert tensors by the per-expert tensors that lie inside them.

    ``experts.gate_up_proj`` [E, 2*I, H] holds gate rows, then up rows, of each expert;
    ``experts.down_proj`` [E, H, I] (transformers 5.23 modeling_glm_moe_dsa.py:519-541). Both are
    contiguous per expert, so every part is a byte range. Other tensors are passed through.
    """
    result: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        parsed = parse(name)
        if parsed.suffix in (FUSED_GATE_UP, FUSED_DOWN):
            for part in _parts_of_fused(parsed, info):
                if part.name in tensors:
                    raise CheckpointError(f"{part.name} is stored twice: alone and within {name}.")
                result[part.name] = part
        else:
            result[name] = info
    return result


def _parts_of_fused(parsed: TensorName, info: TensorInfo) -> list[TensorInfo]:
    projections = PROJECTIONS[:2] if parsed.suffix == FUSED_GATE_UP else PROJECTIONS[2:]
    if len(info.shape) != 3 or info.shape[1] % len(projections):
        raise CheckpointError(
            f"{info.name} has the shape {list(info.shape)}; needed is [experts, rows, columns]"
            " with gate and up rows stacked."
        )
    num_experts, rows, columns = info.shape
    shape = (rows // len(projections), columns)
    nbytes = info.nbytes // num_experts // len(projections)
    assert parsed.layer is not None
    names = [
        expert_name(parsed.layer, expert, projection)
        for expert in range(num_experts)
        for projection in projections
    ]
    return [
        TensorInfo(name, info.dtype, shape, info.file, info.start + number * nbytes, nbytes)
        for number, name in enumerate(names)
    ]
