"""How large the pieces are in which long inputs are computed.

Sizes follow from the config and the sequence's length alone, never from free memory or the number
of threads, so that the same input gives the same bits on every run. Elements, not bytes: times 4
in float32. Imports no torch, so that memory can be planned with the same numbers.
"""

from collections.abc import Iterator

from fourge.models.config import ModelConfig

# Token rows of one step through projections, dense MLP and shared experts.
ROWS = 2048
# Token rows of one step through a routed expert.
EXPERT_ROWS = 4096
# What one group of heads holds over the whole sequence: head_elements for each of its heads.
HEAD_ELEMENTS = 1 << 25
# Attention scores of a group of heads, or index scores of a head, for one chunk of queries. Buffers
# of 16 MiB stay within the heap, where larger ones would be mapped and faulted in anew each time.
SCORE_ELEMENTS = 1 << 22
# Below this many queries a chunk only costs overhead.
MIN_QUERIES = 32


def head_elements(config: ModelConfig, length: int) -> int:
    """Numbers held for one head: query, key, expanded latent (with the value in it), attended
    value and its copy in the order of the output projection.
    """
    expanded = config.qk_nope_head_dim + config.v_head_dim
    return length * (2 * config.qk_head_dim + expanded + 2 * config.v_head_dim)


def head_group(config: ModelConfig, length: int) -> int:
    """Heads that are attended together in a sequence of ``length`` tokens."""
    most = max(1, HEAD_ELEMENTS // head_elements(config, length))
    num_groups = -(-config.num_attention_heads // most)
    return -(-config.num_attention_heads // num_groups)


def attention_queries(config: ModelConfig, length: int) -> int:
    """Queries of one chunk of the main attention."""
    return max(MIN_QUERIES, SCORE_ELEMENTS // (head_group(config, length) * length))


def index_queries(length: int) -> int:
    """Queries of one chunk of the indexer, which scores head by head."""
    return max(MIN_QUERIES, SCORE_ELEMENTS // length)


def slices(length: int, size: int) -> Iterator[slice]:
    """``range(length)`` in consecutive slices of ``size``, the last one shorter."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
