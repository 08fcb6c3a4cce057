"""The embedding table, read once in pieces; the rows of the tokens that occur are kept.

Memory: those rows, at most the whole table, and one buffer (budget.embedding_bytes).
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from fourge.checkpoint.header import TensorInfo
from fourge.checkpoint.source import FileReader, check_finite, read_pieces
from fourge.layerwise.activations import Batch, RowFile
from fourge.layerwise.budget import COPY_BUFFER_BYTES
from fourge.models.config import ModelConfig


def pieces_of(
    files: FileReader, tensors: Sequence[TensorInfo]
) -> Iterator[tuple[TensorInfo, int, torch.Tensor]]:
    """(tensor, first row, rows) of tensors read through one buffer; CheckpointError if a value is
    not finite.
    """
    longest_row = max(info.nbytes // (info.shape or (1,))[0] for info in tensors)
    buffer = torch.empty(max(COPY_BUFFER_BYTES, longest_row), dtype=torch.uint8)
    for info in tensors:
        for first, rows in read_pieces(files, info, buffer):
            check_finite(info.name, rows)
            yield info, first, rows


def look_up(
    pieces: Iterable[tuple[int, torch.Tensor]],
    tokens: np.ndarray,
    config: ModelConfig,
    batches: Sequence[Batch],
    files: Sequence[RowFile],
) -> None:
    """Write the embedding of every token to each of ``files``, from (first row, rows) of the whole
    table.
    """
    used = np.unique(tokens)
    table = torch.empty(len(used), config.hidden_size, dtype=torch.bfloat16)
    for first, rows in pieces:
        low, high = np.searchsorted(used, [first, first + len(rows)])
        table[low:high] = rows[torch.from_numpy(used[low:high] - first)]
    for batch in batches:
        own = tokens[batch.start : batch.start + batch.tokens]
        rows = table[torch.from_numpy(np.searchsorted(used, own))]
        for file in files:
            file.write(batch.start, rows)
