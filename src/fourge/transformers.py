"""``import fourge.transformers``: transformers loads NVFP4 checkpoints of routed experts.

Registers a quantizer for the form of ModelOpt, so that AutoModelForCausalLM.from_pretrained reads
what fourge quantize writes. Experts stay packed, under the checkpoint's names, and are expanded one
projection at a time where tokens reach them; activations are not rounded (the lane w4a16). The rest
of the model is transformers' own: it has no MTP layer, and takes 1e-6 as epsilon of the latent
norms whatever config.json says. Headers are checked before any weight is read. For inference.
Memory: the packed checkpoint; per product one projection on top (14 bytes per weight at most).
"""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from fourge.checkpoint.header import TensorInfo, read_checkpoint
from fourge.checkpoint.metadata import HF_QUANT_CONFIG_NAME, read_config
from fourge.checkpoint.names import PROJECTIONS, Role, expert_name, parse
from fourge.errors import CheckpointError, ConfigError
from fourge.formats.layout import BLOCK_SIZE, packed_shape, scale_shape
from fourge.models.config import ModelConfig, from_dict
from fourge.models.linear import linear, weight_of
from fourge.models.tensors import check_quantized_tensors, expected_tensors

QUANT_METHODS = ("modelopt", "modelopt_fp4")
ALGORITHMS = ("NVFP4", "W4A16_NVFP4")
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Stored tensors that the model has no place for: scales of activations and of an FP8 cache.
_NOT_LOADED = (
    r"\.mlp\.experts\.\d+\.(gate|up|down)_proj\.input_scale$",
    r"\.self_attn\.(.+\.)?[kv]_scale$",
)

logger = logging.get_logger(__name__)


# -- the experts ----------------------------------------------------------------------------------

# T tokens, D hidden, K experts per token, S = T K choices, N tokens of one expert


class PackedLinear(nn.Module):
    """x W^T for an NVFP4 weight [out, in], which is expanded for this product alone.

    A module of its own for every projection: so accelerate moves only those that tokens reach.
    """

    def __init__(self, shape: tuple[int, int], scale_2_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = _empty(packed_shape(shape), torch.uint8)
        self.weight_scale = _empty(scale_shape(shape), torch.float8_e4m3fn)
        self.weight_scale_2 = _empty(scale_2_shape, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, weight_of(dict(self.named_parameters()), "", x.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move to another device, but never cast: model.to(dtype) would round the scales."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class PackedExpert(nn.Module):
    """down(silu(gate x) * up x); a projection that is BF16 in the checkpoint is a plain Linear."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class PackedExperts(nn.ModuleList):
    """The routed experts of one layer, called as transformers calls its own; sums in float32."""

    def forward(self, hidden_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        out_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
        expert_S, order_S = experts_TK.flatten().sort(stable=True)
        counts = expert_S.bincount(minlength=len(self)).tolist()
        for expert, slots_N in zip(self, order_S.split(counts), strict=True):
            if len(slots_N):
                tokens_N = slots_N // experts_TK.shape[-1]
                gates_N = gates_TK.flatten()[slots_N].float()
                y_ND = expert(hidden_TD[tokens_N]).float() * gates_N[:, None]
                out_TD.index_add_(0, tokens_N, y_ND)
        return out_TD.to(hidden_TD.dtype)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


# -- what transformers calls ----------------------------------------------------------------------


class ModelOptConfig(QuantizationConfigMixin):
    """The quantization_config of a config.json, or the contents of a hf_quant_config.json."""

    def __init__(self, **block: Any) -> None:
        # A str with or without a name in that enumeration; transformers compares and looks up.
        self.quant_method = cast("QuantizationMethod", QUANT_METHODS[0])
        self.block = block

    @classmethod
    def from_pretrained(cls, checkpoint: str | PathLike[str], **download: Any) -> "ModelOptConfig":
        """From the hf_quant_config.json of a checkpoint whose config.json says nothing; give it to
        the model's from_pretrained as quantization_config. ``download``: revision, token and so on.
        """
        path = cached_file(checkpoint, HF_QUANT_CONFIG_NAME, **download)
        assert isinstance(path, str)
        try:
            return cls(**json.loads(Path(path).read_bytes()))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read as a JSON object: {error}.") from None

    def to_dict(self) -> dict[str, Any]:
        """The block as it was read, as config.json needs it."""
        return {"quant_method": self.quant_method} | deepcopy(self.block)

    def check(self) -> None:
        """ConfigError unless the block announces NVFP4 in blocks of 16."""
        nested = self.block.get("quantization")  # as in hf_quant_config.json
        block = nested if isinstance(nested, dict) else self.block
        algorithm, group_size = block.get("quant_algo"), block.get("group_size", BLOCK_SIZE)
        if str(algorithm).upper() not in ALGORITHMS or group_size != BLOCK_SIZE:
            raise ConfigError(
                f"the checkpoint's quantization_config has quant_algo {algorithm!r} and group_size"
                f" {group_size}; fourge.transformers reads {' and '.join(ALGORITHMS)} of routed"
                f" experts with group_size {BLOCK_SIZE}: serve this checkpoint with vLLM or SGLang."
            )


class ModelOptQuantizer(HfQuantizer):
    """Puts packed experts in the place of transformers' own before the weights are loaded."""

    quantization_config: ModelOptConfig

    def __init__(self, quantization_config: ModelOptConfig, **_: Any) -> None:
        # Also where the block was given as an argument: there is nothing to quantize here.
        super().__init__(quantization_config, pre_quantized=True)

    def validate_environment(self, *_: Any, **__: Any) -> None:
        self.quantization_config.check()

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in COMPUTE_DTYPES:
            raise ConfigError(
                f"the model was asked for in {dtype}; NVFP4 experts are expanded to float32,"
                " bfloat16 or float16: choose one of them as dtype."
            )
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ConfigError(
                "a distributed model was asked for (tensor or expert parallelism); NVFP4 experts"
                ' are loaded by one process: use device_map="auto", or vLLM or SGLang.'
            )
        if not checkpoint_files:
            raise CheckpointError(
                "weights were given as a state_dict; NVFP4 experts are read from safetensors files:"
                " give the checkpoint's folder to from_pretrained."
            )
        config, tensors = _read_headers(Path(checkpoint_files[0]).parent)
        _place_experts(model.base_model.layers, config, tensors)
        mtp = {rf"^model\.layers\.{layer}\." for layer in config.mtp_layers}
        model._keys_to_ignore_on_load_unexpected |= {*_NOT_LOADED, *mtp}

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        """Without those that would stack the experts: here they keep the checkpoint's names.

        transformers 5.19 gives no model.
        """
        return [
            conversion
            for conversion in weight_conversions
            if not isinstance(conversion, WeightConverter)
            or not any("mlp.experts." in target for target in conversion.target_patterns)
        ]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        # Without gradients no product keeps the weight that was expanded for it.
        return model.requires_grad_(False)

    def is_serializable(self) -> Any:
        logger.warning(
            "a model loaded from an NVFP4 checkpoint is not written by save_pretrained, which would"
            " leave out the MTP layer and the experts' input scales: copy the checkpoint's folder."
        )
        return False

    @property
    def is_trainable(self) -> Any:
        return False


# -- the checkpoint -------------------------------------------------------------------------------


def _read_headers(folder: Path) -> tuple[ModelConfig, Mapping[str, TensorInfo]]:
    """Raises ConfigError or CheckpointError unless routed experts, and they alone, are NVFP4."""
    config = from_dict(read_config(folder)[1])
    tensors = read_checkpoint(folder).tensors
    _check_quantized_roles(tensors, config)
    check_quantized_tensors(tensors, config)
    return config, tensors


def _check_quantized_roles(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> None:
    names = [name for name in expected_tensors(config, mtp=False) if name in tensors]
    quantized = [name for name in names if tensors[name].dtype not in ("BF16", "F16", "F32")]
    for name in quantized:
        if parse(name).role != Role.ROUTED_EXPERT or tensors[name].dtype != "U8":
            raise CheckpointError(
                f"tensor {name} is {tensors[name].dtype}; fourge.transformers reads checkpoints"
                " whose routed experts alone are quantized, to NVFP4: serve this one with vLLM or"
                " SGLang."
            )
    if not quantized:
        raise CheckpointError(
            "no routed expert of the checkpoint is NVFP4, though its quantization_config says so:"
            " take that away, and transformers loads the checkpoint by itself."
        )


def _place_experts(
    layers: nn.ModuleList, config: ModelConfig, tensors: Mapping[str, TensorInfo]
) -> None:
    if len(layers) > config.num_hidden_layers:
        raise ConfigError(
            f"the model was asked for with {len(layers)} layers; its checkpoint has"
            f" {config.num_hidden_layers}: leave num_hidden_layers as config.json has it."
        )
    for layer, module in enumerate(layers):
        if config.is_sparse(layer):
            mlp: Any = module.mlp
            mlp.experts = PackedExperts(
                PackedExpert(*(_projection(tensors, layer, e, name) for name in PROJECTIONS))
                for e in range(config.n_routed_experts)
            )


def _projection(
    tensors: Mapping[str, TensorInfo], layer: int, expert: int, projection: str
) -> nn.Module:
    """An empty module for what is stored, on the device that transformers has set."""
    info = tensors[expert_name(layer, expert, projection)]
    num_rows, num_columns = info.shape
    if info.dtype != "U8":
        return nn.Linear(num_columns, num_rows, bias=False)
    scale_2 = tensors[expert_name(layer, expert, projection, "weight_scale_2")]
    return PackedLinear((num_rows, 2 * num_columns), scale_2.shape)


# -- registration ---------------------------------------------------------------------------------


def _register() -> None:
    """The last import wins: transformers refuses a name that it has."""
    for method in QUANT_METHODS:
        AUTO_QUANTIZATION_CONFIG_MAPPING.pop(method, None)
        AUTO_QUANTIZER_MAPPING.pop(method, None)
        register_quantization_config(method)(ModelOptConfig)
        register_quantizer(method)(ModelOptQuantizer)


_register()
