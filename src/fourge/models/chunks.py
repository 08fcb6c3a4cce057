"""How large the pieces are in which long inputs are computed.

Sizes follow from the config and the sequence's length alone, never from free memory or the number
of threads, so that the same input gives the same bits on every run. Elements, not bytes: times 4
in float32. Imports no torch, so that memory can be planned with the same numbers.
"""

from collections.abc import Iterator, Sequence

from fourge.models.config import ModelConfig

# Token rows of one step through projections, dense MLP and shared experts.
ROWS = 2048
# Neighbouring sequences of equal length are attended together up to this many tokens.
RUN_TOKENS = 8192
# Token rows of one step through a routed expert.
EXPERT_ROWS = 4096
# What one group of heads holds over the whole sequence: head_elements for each of its heads.
HEAD_ELEMENTS = 1 << 25
# Attention scores of a group of heads, or index scores of a head, for one chunk of queries. Buffers
# of 16 MiB stay within the heap, where larger ones would be mapped and faulted in anew each time.
SCORE_ELEMENTS = 1 << 22
# Chunks of fewer queries would leave a GPU idle; it may take the scores above SCORE_ELEMENTS.
MIN_QUERIES = 256


def runs(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of neighbouring sequences that have one length and go together."""
    first = 0
    while first < len(lengths):
        most = max(1, RUN_TOKENS // lengths[first])
        count = 1
        while count < most and _equal(lengths, first, first + count):
            count += 1
        yield first, count
        first += count


def head_elements(config: ModelConfig, tokens: int) -> int:
    """Numbers held for one head: query, key, expanded latent (with the value in it), the value
    widened to the key, attended value and its copy in the order of the output projection.
    """
    expanded = config.qk_nope_head_dim + config.v_head_dim
    widened = config.qk_head_dim if config.qk_head_dim > config.v_head_dim else 0
    return tokens * (2 * config.qk_head_dim + expanded + widened + 2 * config.v_head_dim)


def head_group(config: ModelConfig, tokens: int) -> int:
    """Heads that are attended together in a run of ``tokens`` tokens."""
    most = max(1, HEAD_ELEMENTS // head_elements(config, tokens))
    num_groups = -(-config.num_attention_heads // most)
    return -(-config.num_attention_heads // num_groups)


def attention_queries(config: ModelConfig, count: int, length: int) -> int:
    """Queries of one chunk of the main attention, for ``count`` sequences of ``length``."""
    tokens = count * length
    return max(MIN_QUERIES, SCORE_ELEMENTS // (head_group(config, tokens) * tokens))


def index_queries(count: int, length: int) -> int:
    """Queries of one chunk of the indexer, which scores head by head."""
    return max(MIN_QUERIES, SCORE_ELEMENTS // (count * length))


def run_rows(count: int) -> int:
    """Positions of one step through the projections, for ``count`` sequences at once."""
    return max(1, ROWS // count)


def slices(length: int, size: int) -> Iterator[slice]:
    """``range(length)`` in consecutive slices of ``size``, the last one shorter."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _equal(lengths: Sequence[int], first: int, second: int) -> bool:
    return second < len(lengths) and lengths[first] == lengths[second]
