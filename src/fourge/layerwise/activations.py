"""What flows between layers, in files: one row per token, read and written a batch at a time.

Activations always live in files. Where memory is plentiful the operating system keeps them in its
page cache; where it is not, they do not count against the run's budget; and a killed run finds
them again. A ``Batch`` is what every layer computes on: whole sequences of one pass, packed without
padding, of a size that depends on the recipe alone, so that results do not depend on memory.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fourge.checkpoint.source import read_all, tensor_bytes
from fourge.checkpoint.writer import PARTIAL_SUFFIX, sync_folder, write_all, writing
from fourge.errors import OutputError
from fourge.models.config import ModelConfig
from fourge.models.moe import Routed


@dataclass(frozen=True)
class Batch:
    """Consecutive sequences of one pass: rows ``start`` to ``start + tokens`` of every row file."""

    pass_index: int
    start: int
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def make_batches(
    lengths: Sequence[int], pass_of: Sequence[int], *, batch_tokens: int
) -> list[Batch]:
    """Pack neighbouring sequences of one pass up to ``batch_tokens``; a longer one stays alone."""
    batches: list[Batch] = []
    pending: list[int] = []
    start = position = 0
    for number, length in enumerate(lengths):
        starts_pass = number > 0 and pass_of[number] != pass_of[number - 1]
        if pending and (starts_pass or sum(pending) + length > batch_tokens):
            batches.append(Batch(pass_of[number - 1], start, tuple(pending)))
            pending, start = [], position
        pending.append(length)
        position += length
    if pending:
        batches.append(Batch(pass_of[len(lengths) - 1], start, tuple(pending)))
    return batches


class RowFile:
    """A file of equal rows, one per token. Rows that are never written take no space (holes)."""

    def __init__(self, path: Path, *, width: int, dtype: torch.dtype) -> None:
        self._path = path
        self._width = width
        self._dtype = dtype
        self._row_bytes = width * dtype.itemsize
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        self._descriptor: int | None = None

    def create(self) -> "RowFile":
        """Open for writing and reading under a temporary name."""
        with writing(self._partial):
            self._descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        return self

    def open(self) -> "RowFile":
        """Open a committed file for reading; OutputError if it is gone."""
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise OutputError(
                f"{self._path}, which the interrupted run left behind, cannot be read"
                f" ({error.strerror}): bring it back, or choose another output folder and start"
                " again."
            ) from error
        return self

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Write rows [n, width] at token ``start``, cast to the file's dtype."""
        assert self._descriptor is not None
        rows = rows.to("cpu", self._dtype).contiguous()
        with writing(self._partial):
            write_all(self._descriptor, tensor_bytes(rows), start * self._row_bytes)

    def read(self, start: int, count: int) -> torch.Tensor:
        """Rows [count, width] from token ``start`` on, on the CPU."""
        assert self._descriptor is not None
        rows = torch.empty(count, self._width, dtype=self._dtype)
        if not read_all(self._descriptor, rows, start * self._row_bytes):
            raise OutputError(
                f"{self._path} is shorter than the run needs: it was changed from outside;"
                " remove the output folder and start again."
            )
        return rows

    def commit(self) -> None:
        """Sync, and give the file its final name. It stays open."""
        assert self._descriptor is not None
        with writing(self._path):
            os.fsync(self._descriptor)
            os.rename(self._partial, self._path)
            sync_folder(self._path.parent)

    def close(self) -> None:
        """Close; an uncommitted file is removed."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._partial.unlink(missing_ok=True)


def hidden_file(
    folder: Path, config: ModelConfig, layer: int, dtype: torch.dtype = torch.bfloat16
) -> RowFile:
    """The residual stream that enters ``layer``; BF16 is how engines hold it."""
    path = folder / f"hidden-{layer:05d}.bin"
    return RowFile(path, width=config.hidden_size, dtype=dtype)


def topk_file(folder: Path, config: ModelConfig, layer: int) -> RowFile:
    """The selections that a layer with a shared indexer takes over from the layer before it."""
    return RowFile(folder / f"topk-{layer:05d}.bin", width=config.index_topk, dtype=torch.int32)


def remove_before(folder: Path, layer: int) -> None:
    """Delete the inputs of layers that are done."""
    for path in [*folder.glob("hidden-?????.bin"), *folder.glob("topk-?????.bin")]:
        if int(path.stem.split("-")[1]) < layer:
            path.unlink()


class LayerActivations:
    """The files around one layer: its input, its output, and what waits between expert groups.

    ``dtype`` and ``device`` are those of the computation, ``stream`` that of the hidden state
    between layers. What waits keeps its full precision, so that the number of groups does not
    change a bit of the result. The last layer's output is kept only with ``keep_last``.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        layer: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        stream: torch.dtype = torch.bfloat16,
        keep_last: bool = False,
    ) -> None:
        self._config, self._layer = config, layer
        self._dtype, self._device = dtype, device
        self._is_last = layer == config.num_hidden_layers - 1
        self._has_output = keep_last or not self._is_last
        self._hidden = hidden_file(folder, config, layer, stream)
        self._next_hidden = hidden_file(folder, config, layer + 1, stream)
        self._topk = topk_file(folder, config, layer)
        self._next_topk = topk_file(folder, config, layer + 1)
        widths = {
            "x_TD": (config.hidden_size, dtype),
            "experts_TK": (config.num_experts_per_tok, torch.int64),
            "gates_TK": (config.num_experts_per_tok, torch.float32),
            "acc_TD": (config.hidden_size, torch.float32),
        }
        self._waiting = {
            field: RowFile(folder / f"waiting-{field}.bin", width=width, dtype=kind)
            for field, (width, kind) in widths.items()
        }
        self._created: set[str] = set()

    def __enter__(self) -> "LayerActivations":
        self._hidden.open()
        if self._shares(self._layer):
            self._topk.open()
        if self._has_output:
            self._next_hidden.create()
        if self._passes_topk_on:
            self._next_topk.create()
        return self

    def __exit__(self, *_: object) -> None:
        files = (self._hidden, self._next_hidden, self._topk, self._next_topk)
        for file in (*files, *self._waiting.values()):
            file.close()

    def _shares(self, layer: int) -> bool:
        return self._config.uses_dsa and self._config.indexer_types[layer] == "shared"

    @property
    def _passes_topk_on(self) -> bool:
        return not self._is_last and self._shares(self._layer + 1)

    def read_input(self, batch: Batch) -> torch.Tensor:
        """hidden_TD of a batch, in the dtype and on the device of the computation."""
        return self._hidden.read(batch.start, batch.tokens).to(self._device, self._dtype)

    def write_output(self, batch: Batch, hidden_TD: torch.Tensor) -> None:
        """The next layer's input."""
        if self._has_output:
            self._next_hidden.write(batch.start, hidden_TD)

    def read_topk(self, batch: Batch) -> list[torch.Tensor | None] | None:
        """Per sequence the selection int32 [L, index_topk] to take over, None where all fits."""
        if not self._shares(self._layer):
            return None
        return [
            self._topk.read(start, length).to(self._device) if selects else None
            for start, length, selects in self._sequences(batch)
        ]

    def write_topk(self, batch: Batch, topk: Sequence[torch.Tensor | None] | None) -> None:
        """Keep the selection if the next layer takes it over."""
        if not self._passes_topk_on:
            return
        assert topk is not None
        for (start, _, selects), selection in zip(self._sequences(batch), topk, strict=True):
            if selects:
                assert selection is not None
                self._next_topk.write(start, selection)

    def _sequences(self, batch: Batch) -> Iterator[tuple[int, int, bool]]:
        """(first row, length, whether the sequence is long enough to select) per sequence."""
        start = batch.start
        for length in batch.lengths:
            yield start, length, length > self._config.index_topk
            start += length

    def hold(self, batch: Batch, routed: Routed, *, is_first: bool) -> None:
        """Keep a batch until the next group of experts is in memory; after the first group only
        the sum has changed.
        """
        for field, file in self._waiting.items():
            if field not in self._created:
                file.create()
                self._created.add(field)
            if is_first or field == "acc_TD":
                file.write(batch.start, getattr(routed, field))

    def take_up(self, batch: Batch) -> Routed:
        """What ``hold`` kept."""
        return Routed(
            **{
                field: file.read(batch.start, batch.tokens).to(self._device)
                for field, file in self._waiting.items()
            }
        )

    def commit(self) -> None:
        """Make the output last. The layer's shards are committed after it."""
        if self._passes_topk_on:
            self._next_topk.commit()
        if self._has_output:
            self._next_hidden.commit()
