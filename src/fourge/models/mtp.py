"""The multi-token-prediction layer: from a token's final hidden state and its successor's embedding
to a hidden state that predicts the token after.

    z = [rms(embedding(t_p+1); enorm) | rms(h_p; hnorm)]  (embedding first)     r = z Weh^T
    n = rms(decoder_layer(r); shared_head.norm)           logits = lm_head(n)

h_p is the target's output after model.norm. n is both what lm_head reads and what the next draft
step takes as h: the norm is applied once. Follows vllm 0.33 and sglang 0.5.23, except that vllm
zeroes the embedding at position 0 (it touches acceptance only; sglang does not).
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from fourge.models.config import ModelConfig
from fourge.models.layer import decoder_layer
from fourge.models.linear import linear
from fourge.models.norm import rms_norm
from fourge.models.rope import RopeTable

# T tokens of all sequences, D hidden

Norm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def mtp_forward(
    hidden_TD: torch.Tensor,
    next_embedding_TD: torch.Tensor,
    lengths: Sequence[int],
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    rope: RopeTable,
) -> torch.Tensor:
    """The normed hidden state n_TD of every position; ``weights`` are those of the MTP layer."""
    residual_TD = mtp_input(hidden_TD, next_embedding_TD, weights, config)
    layer = config.num_hidden_layers
    out_TD, _ = decoder_layer(residual_TD, lengths, weights, config, layer, rope, None)
    return mtp_output(out_TD, weights, config)


def mtp_input(
    hidden_TD: torch.Tensor,
    next_embedding_TD: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    norm: Norm = rms_norm,
) -> torch.Tensor:
    """r: what the decoder layer inside reads. ``norm``: a faster twin."""
    eps = config.rms_norm_eps
    joint = torch.cat(
        [
            norm(next_embedding_TD, weights["enorm.weight"], eps),
            norm(hidden_TD, weights["hnorm.weight"], eps),
        ],
        dim=-1,
    )
    return linear(joint, weights["eh_proj.weight"])


def mtp_output(
    out_TD: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    config: ModelConfig,
    norm: Norm = rms_norm,
) -> torch.Tensor:
    """n, from what the decoder layer inside gives."""
    return norm(out_TD, weights["shared_head.norm.weight"], config.rms_norm_eps)
