"""Bytes of activations that computing one batch takes, from ModelConfig alone.

The one formula behind ``--memory``: the temporaries of layer.py, mla.py, dsa.py and moe.py at their
largest moment, with the pieces of chunks.py. It errs on the high side; tests hold the peak of real
runs against the budgets that it leads to. Imports no torch.
"""

from dataclasses import dataclass

from fourge.models import chunks
from fourge.models.config import ModelConfig

FLOAT32 = 4
# What a general allocator keeps beyond what it was asked for, as a share of the temporaries.
ALLOCATOR_SLACK = 0.2


@dataclass(frozen=True)
class Load:
    """What is computed at a time: tokens of the largest batch, of the longest sequence."""

    batch_tokens: int
    longest: int


def compute_bytes(config: ModelConfig, load: Load, *, itemsize: int) -> int:
    """Temporaries of one batch through any layer, its cast weights included.

    ``itemsize``: bytes of the compute dtype; weights (BF16) are cast where it is not 2.
    """
    cast = FLOAT32 if itemsize != 2 else 0
    stream = load.batch_tokens * config.hidden_size
    attention = 3 * stream * itemsize + _attention(config, load, itemsize, cast)
    # hidden, the experts' input and their sum
    moe = stream * (2 * itemsize + FLOAT32) + _moe(config, load, itemsize, cast)
    dense = 2 * stream * itemsize + _mlp_step(
        config, config.intermediate_size, chunks.ROWS, itemsize, cast
    )
    return round(max(attention, moe, dense) * (1 + ALLOCATOR_SLACK))


def cache_bytes_per_token(config: ModelConfig, dtype: str, *, mtp: bool = False) -> int:
    """What one token takes in a serving engine's KV cache; every tensor-parallel rank holds it.

    dtype: "fp8", "nvfp4" or "bf16". With sparse attention fp8 is the layout fp8_ds_mla: latent
    in E4M3 with one float32 scale per 128 values, rotary part in BF16 (GLM: 512 + 16 + 128 = 656),
    and nvfp4 is nvfp4_ds_mla (latent in half the bytes, scales per 16, GLM: 256 + 32 + 64 = 352).
    A layer with an indexer adds its key in E4M3 and one float32 scale per 128 (GLM: 132). Without
    an indexer fp8 is latent and rotary part in E4M3.
    vllm 0.33.0 mla_attention.py:357-375, kernels.py:96-119; sglang 0.5.23
    kv_cache_configurator.py:3412-3470.
    """
    layers = range(config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0))
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    if dtype == "bf16":
        entry = 2 * (latent + rope)
    elif dtype == "nvfp4":
        entry = latent // 2 + latent // 16 + rope
    elif config.uses_dsa:
        entry = latent + 4 * -(-latent // 128) + 2 * rope
    else:
        entry = latent + rope
    key = config.index_head_dim + 4 * -(-config.index_head_dim // 128)
    return entry * len(layers) + key * sum(map(config.has_indexer, layers))


def _attention(config: ModelConfig, load: Load, itemsize: int, cast: int) -> int:
    hidden = config.hidden_size
    # Sequences go side by side up to RUN_TOKENS; a longer one goes alone.
    tokens = min(load.batch_tokens, max(load.longest, chunks.RUN_TOKENS))
    query_width = config.q_lora_rank or hidden
    latents = tokens * (query_width + config.kv_lora_rank + config.qk_rope_head_dim)
    group = chunks.head_group(config, tokens)
    heads = group * chunks.head_elements(config, tokens)
    rotated = group * tokens * config.qk_rope_head_dim
    rows = min(tokens, chunks.ROWS)
    return (
        cast * _attention_weights(config)
        + itemsize * (2 * latents + heads + 4 * rows * hidden)
        # rope and norms compute in float32, as does the sum over head groups
        + FLOAT32 * (tokens * hidden + 3 * rotated + 2 * rows * hidden + _scores(group, tokens))
        + _selection(config, load, tokens)
    )


def _scores(heads: int, tokens: int) -> int:
    """Scores of one chunk of queries, thrice: where query and value heads differ in size, torch
    computes them whole; and their mask.
    """
    return 4 * max(chunks.SCORE_ELEMENTS, heads * tokens * min(tokens, chunks.MIN_QUERIES))


def _selection(config: ModelConfig, load: Load, tokens: int) -> int:
    """The indexer's inputs and scores, and a batch's selections, taken over and new."""
    if not config.uses_dsa or load.longest <= config.index_topk:
        return 0
    queries = min(tokens, chunks.index_queries(1, tokens))
    inputs = 2 * tokens * (config.index_head_dim + config.index_n_heads)
    query = 3 * queries * config.index_n_heads * config.index_head_dim
    scores = 3 * max(chunks.SCORE_ELEMENTS, queries * tokens)
    best = 5 * queries * config.index_topk
    return FLOAT32 * (inputs + query + scores + best + 3 * load.batch_tokens * config.index_topk)


def _attention_weights(config: ModelConfig) -> int:
    hidden, heads = config.hidden_size, config.num_attention_heads
    query_width = config.q_lora_rank or hidden
    return (
        (hidden * query_width if config.q_lora_rank else 0)
        + query_width * heads * config.qk_head_dim
        + hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
        + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + hidden * heads * config.v_head_dim
        + config.index_n_heads * (config.index_head_dim * query_width + hidden)
        + config.index_head_dim * hidden
    )


def _moe(config: ModelConfig, load: Load, itemsize: int, cast: int) -> int:
    shared = config.n_shared_experts * config.moe_intermediate_size
    # 64-bit numbers for sorting the tokens by expert, and the router's logits
    choices = load.batch_tokens * (config.num_experts_per_tok * 48)
    logits = chunks.ROWS * (config.n_routed_experts * 4 + config.hidden_size) * FLOAT32
    rows = min(load.batch_tokens, chunks.EXPERT_ROWS)
    # observed values are squared in float32, the output is scaled in it
    observed = 2 * rows * config.hidden_size * FLOAT32
    step = _mlp_step(config, config.moe_intermediate_size, rows, itemsize, cast) + observed
    return choices + logits + max(step, _mlp_step(config, shared, chunks.ROWS, itemsize, cast))


def _mlp_step(config: ModelConfig, inner: int, rows: int, itemsize: int, cast: int) -> int:
    """Cast weights, and one chunk of rows through gate, up and down."""
    weights = 3 * config.hidden_size * inner * cast
    return weights + rows * (3 * config.hidden_size + 3 * inner) * itemsize
