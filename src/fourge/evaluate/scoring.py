"""From the last hidden states to KL divergence: final norm and lm_head, in FP32 for every stream.

lm_head is not quantized, so its own rounding is kept out of the measure. Its rows are read in
pieces, once, each model's from its own checkpoint; hidden states are read again for every piece.
Memory: a piece of every model's lm_head in BF16 and FP32, one chunk of logits (working_bytes).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import torch
import torch.nn.functional as F

from fourge.checkpoint.header import TensorInfo
from fourge.checkpoint.source import FileReader, check_finite, read_pieces
from fourge.evaluate.divergence import Divergence, Positions
from fourge.evaluate.streams import Model
from fourge.models.chunks import slices
from fourge.models.config import ModelConfig
from fourge.models.norm import rms_norm

# Logits of one chunk, tokens x vocabulary entries, and its least tokens; a GPU wants more of both.
LOGITS = {"cpu": 1 << 20, "cuda": 1 << 24}
LEAST_ROWS = {"cpu": 256, "cuda": 1024}
# Of one logit while it is in divergence.py: FP32 of two streams, FP64 of both and of their terms.
LOGIT_BYTES = 2 * 4 + 5 * 8


def working_bytes(config: ModelConfig, num_models: int, num_streams: int, device: str) -> int:
    """What scoring holds besides the figures of every token."""
    entries, rows = _chunk(config, device)
    head = num_models * entries * config.hidden_size * (2 + 4)
    states = num_streams * rows * config.hidden_size * 3 * 4
    return head + states + rows * entries * (4 * num_streams + LOGIT_BYTES)


def token_bytes(tokens: int, num_streams: int) -> int:
    """What is kept of every token while the vocabulary goes by, and of its figures afterwards."""
    return tokens * 8 * (6 + 8 * num_streams)


def score(
    models: Sequence[Model],
    tokens: np.ndarray,
    *,
    device: torch.device,
    advance: Callable[[int], None],
) -> dict[str, Positions]:
    """Positions of every stream but the reference, which is the first stream of the first model.

    ``advance`` is told the bytes of lm_head that are done.
    """
    config = models[0].source.config
    entries, num_rows = _chunk(config, device.type)
    targets_T = torch.from_numpy(np.append(tokens[1:], 0).astype(np.int64)).to(device)
    streams = [(model, stream) for model in models for stream in model.streams]
    divergence = Divergence(targets_T, [stream.name for _, stream in streams[1:]])
    norms = {model.name: _final_norm(model, device) for model in models}
    with ExitStack() as stack:
        hidden = [stream.entering(config, config.num_hidden_layers).open() for _, stream in streams]
        for file in hidden:
            stack.callback(file.close)
        for first, heads in _head_pieces(models, entries, device):
            for rows in slices(len(tokens), num_rows):
                logits = {}
                for (model, stream), file in zip(streams, hidden, strict=True):
                    state_ND = file.read(rows.start, rows.stop - rows.start).to(device)
                    state_ND = rms_norm(state_ND, norms[model.name], config.rms_norm_eps)
                    logits[stream.name] = F.linear(state_ND.float(), heads[model.name])
                reference = logits.pop(streams[0][1].name)
                divergence.add(rows, first, reference, logits)
            advance(sum(head.numel() * 2 for head in heads.values()))
    return {stream.name: divergence.positions(stream.name) for _, stream in streams[1:]}


def head_bytes(model: Model) -> int:
    """Bytes of the model's lm_head."""
    return _head_info(model).nbytes


def _chunk(config: ModelConfig, device: str) -> tuple[int, int]:
    """(vocabulary entries, tokens) of one chunk."""
    entries = min(config.vocab_size, LOGITS[device] // LEAST_ROWS[device])
    return entries, LOGITS[device] // entries


def _head_info(model: Model) -> TensorInfo:
    tied = model.source.config.tie_word_embeddings
    return model.source.tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]


def _final_norm(model: Model, device: torch.device) -> torch.Tensor:
    info = model.source.tensors["model.norm.weight"]
    buffer = torch.empty(info.nbytes, dtype=torch.uint8)
    with FileReader(model.source.folder) as files:
        (_, rows), *_ = read_pieces(files, info, buffer)
        check_finite(f"{info.name} of {model.source.folder}", rows)
        return rows.flatten().clone().to(device)


def _head_pieces(
    models: Sequence[Model], entries: int, device: torch.device
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """(first vocabulary entry, model name -> FP32 rows of its lm_head), in step."""
    with ExitStack() as stack:
        readers = []
        for model in models:
            info = _head_info(model)
            buffer = torch.empty(entries * info.nbytes // info.shape[0], dtype=torch.uint8)
            files = stack.enter_context(FileReader(model.source.folder))
            readers.append(read_pieces(files, info, buffer))
        for pieces in zip(*readers, strict=True):
            heads = {}
            for model, (_, rows) in zip(models, pieces, strict=True):
                check_finite(f"{_head_info(model).name} of {model.source.folder}", rows)
                heads[model.name] = rows.to(device).float()
            yield pieces[0][0], heads
