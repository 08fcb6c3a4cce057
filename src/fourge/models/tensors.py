"""Which tensors a model of a given config must have, with their shapes.

Names come from checkpoint/names.py, dimensions from ModelConfig; Linear weights are [out, in].
``check_tensors`` compares the list with a checkpoint's headers. Imports no torch.
Source of the list: GLM-5.1's index (59,870 tensors: 17 per dense layer, 787 per MoE layer, 791 in
the MTP layer) and the loaders of vllm 0.33.0 and sglang 0.5.23.
"""

from collections.abc import Mapping

from fourge.checkpoint.header import TensorInfo
from fourge.checkpoint.names import PROJECTIONS, Role, expert_suffix, layer_name, parse
from fourge.errors import CheckpointError
from fourge.formats.layout import packed_shape, scale_shape
from fourge.models.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]

# Tensors that a checkpoint may store in higher precision than BF16 (engines hold them in F32).
FLOAT32_ALLOWED = frozenset({Role.ROUTER, Role.INDEXER, Role.NORM, Role.FINAL_NORM, Role.ATTENTION})


def expected_tensors(config: ModelConfig, *, mtp: bool = True) -> Shapes:
    """Name -> shape of every tensor that a BF16 checkpoint of ``config`` must have."""
    shapes: Shapes = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    for layer in range(config.num_hidden_layers):
        shapes |= {
            layer_name(layer, suffix): s for suffix, s in layer_shapes(config, layer).items()
        }
    for layer in config.mtp_layers if mtp else ():
        shapes |= {
            layer_name(layer, suffix): s for suffix, s in layer_shapes(config, layer).items()
        }
    return shapes


def layer_shapes(config: ModelConfig, layer: int) -> Shapes:
    """Suffix -> shape of the tensors of one layer, the MTP layer included."""
    hidden = config.hidden_size
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    shapes |= _attention_shapes(config)
    if config.has_indexer(layer):
        shapes |= _indexer_shapes(config)
    shapes |= _moe_shapes(config) if config.is_sparse(layer) else _mlp_shapes(config)
    if layer in config.mtp_layers:
        shapes |= {
            "eh_proj.weight": (hidden, 2 * hidden),
            "enorm.weight": (hidden,),
            "hnorm.weight": (hidden,),
            "shared_head.norm.weight": (hidden,),
        }
    return shapes


def _attention_shapes(config: ModelConfig) -> Shapes:
    hidden, heads = config.hidden_size, config.num_attention_heads
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    shapes: Shapes = {
        "self_attn.kv_a_proj_with_mqa.weight": (latent + rope, hidden),
        "self_attn.kv_a_layernorm.weight": (latent,),
        "self_attn.kv_b_proj.weight": (
            heads * (config.qk_nope_head_dim + config.v_head_dim),
            latent,
        ),
        "self_attn.o_proj.weight": (hidden, heads * config.v_head_dim),
    }
    if config.q_lora_rank is None:
        return shapes | {"self_attn.q_proj.weight": (heads * config.qk_head_dim, hidden)}
    return shapes | {
        "self_attn.q_a_proj.weight": (config.q_lora_rank, hidden),
        "self_attn.q_a_layernorm.weight": (config.q_lora_rank,),
        "self_attn.q_b_proj.weight": (heads * config.qk_head_dim, config.q_lora_rank),
    }


def _indexer_shapes(config: ModelConfig) -> Shapes:
    heads, dim = config.index_n_heads, config.index_head_dim
    assert config.q_lora_rank is not None
    return {
        "self_attn.indexer.wq_b.weight": (heads * dim, config.q_lora_rank),
        "self_attn.indexer.wk.weight": (dim, config.hidden_size),
        "self_attn.indexer.k_norm.weight": (dim,),
        "self_attn.indexer.k_norm.bias": (dim,),
        "self_attn.indexer.weights_proj.weight": (heads, config.hidden_size),
    }


def _mlp_shapes(config: ModelConfig) -> Shapes:
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }


def _moe_shapes(config: ModelConfig) -> Shapes:
    hidden, num_experts = config.hidden_size, config.n_routed_experts
    shapes: Shapes = {
        "mlp.gate.weight": (num_experts, hidden),
        "mlp.gate.e_score_correction_bias": (num_experts,),
    }
    if config.n_shared_experts:
        inner = config.n_shared_experts * config.moe_intermediate_size
        shapes |= {
            "mlp.shared_experts.gate_proj.weight": (inner, hidden),
            "mlp.shared_experts.up_proj.weight": (inner, hidden),
            "mlp.shared_experts.down_proj.weight": (hidden, inner),
        }
    for expert in range(num_experts):
        for projection in PROJECTIONS:
            shapes[expert_suffix(expert, projection)] = projection_shape(config, projection)
    return shapes


def projection_shape(config: ModelConfig, projection: str) -> tuple[int, int]:
    """[out, in] of a routed expert's ``projection``."""
    inner = config.moe_intermediate_size
    hidden = config.hidden_size
    return (hidden, inner) if projection == "down_proj" else (inner, hidden)


def check_tensors(tensors: Mapping[str, TensorInfo], config: ModelConfig, *, mtp: bool) -> None:
    """Compare a BF16 source's (unfused) tensors with what ``config`` demands.

    ``mtp``: whether the MTP layer must be complete; if not, its tensors are not looked at. Raises
    CheckpointError for a missing tensor, a wrong shape or dtype, an unknown name, or a layer that
    the config does not have.
    """
    expected = expected_tensors(config, mtp=mtp)
    _check_missing(tensors, expected, config)
    num_layers = config.num_hidden_layers + len(config.mtp_layers)
    for name, info in tensors.items():
        parsed = parse(name)
        if parsed.layer is not None and parsed.layer >= num_layers:
            raise CheckpointError(
                f"tensor {name} belongs to layer {parsed.layer}, but config.json describes"
                f" {config.num_hidden_layers} layers and num_nextn_predict_layers"
                f" {config.num_nextn_predict_layers}: correct config.json or remove the tensor."
            )
        if not mtp and parsed.layer in config.mtp_layers:
            continue
        if name in expected:
            _check_shape(info, expected[name])
        _check_dtype(info, parsed.role)


def check_quantized_tensors(
    tensors: Mapping[str, TensorInfo], config: ModelConfig, *, mtp: bool = False
) -> None:
    """Compare a checkpoint whose routed experts are NVFP4, all or some, with what ``config``
    demands; the MTP layer is looked at only with ``mtp``. ``input_scale`` may be absent.

    Raises CheckpointError for a missing tensor, or a wrong shape or dtype.
    """
    expected = expected_tensors(config, mtp=mtp)
    _check_missing(tensors, expected, config)
    for name, shape in expected.items():
        info = tensors[name]
        if parse(name).role == Role.ROUTED_EXPERT and info.dtype == "U8":
            _check_nvfp4(tensors, name, shape)
            continue
        _check_shape(info, shape)
        _check_dtype(info, parse(name).role)


def _check_nvfp4(tensors: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...]) -> None:
    parts = {
        name: ("U8", packed_shape(shape)),
        f"{name}_scale": ("F8_E4M3", scale_shape(shape)),
        f"{name}_scale_2": ("F32", ()),
    }
    for part, (dtype, wanted) in parts.items():
        info = tensors.get(part)
        scalar = info is not None and not wanted and info.shape == (1,)
        if info is None or info.dtype != dtype or not (scalar or info.shape == wanted):
            found = f"{info.dtype} {list(info.shape)}" if info else "nothing"
            raise CheckpointError(
                f"{part} should be {dtype} {list(wanted)}, found is {found}: run fourge doctor on"
                " this checkpoint."
            )


def _check_missing(
    tensors: Mapping[str, TensorInfo], expected: Shapes, config: ModelConfig
) -> None:
    missing = [name for name in expected if name not in tensors]
    if not missing:
        return
    in_mtp = [name for name in missing if parse(name).layer in config.mtp_layers]
    if len(in_mtp) == len(missing):
        raise CheckpointError(
            f"the MTP layer is incomplete: {len(missing)} tensors are missing, first {missing[0]},"
            f" though config.json has num_nextn_predict_layers {config.num_nextn_predict_layers}:"
            " get them from the original checkpoint, or leave the layer out with --mtp drop."
        )
    raise CheckpointError(
        f"{len(missing)} tensors that config.json demands are missing, first {missing[0]}:"
        " download the checkpoint again."
    )


def _check_shape(info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"tensor {info.name} in {info.file} has the shape {list(info.shape)}; config.json"
            f" demands {list(shape)}: they belong to different models."
        )


def _check_dtype(info: TensorInfo, role: Role) -> None:
    if info.dtype == "BF16" or (info.dtype == "F32" and role in FLOAT32_ALLOWED):
        return
    hint = (
        "an FP8 or quantized source would be quantized twice; start from the BF16 checkpoint."
        if info.dtype.startswith(("F8", "U8", "I8"))
        else "convert the checkpoint to BF16 first, as its publisher does."
    )
    raise CheckpointError(f"tensor {info.name} is {info.dtype}; needed is BF16: {hint}")
