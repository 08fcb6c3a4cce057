"""The shards that are being written, of one target or of several with the same plan."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from fourge.checkpoint.source import tensor_bytes
from fourge.checkpoint.writer import ShardPlan, ShardWriter


@contextmanager
def open_writers(
    folders: Iterable[Path], plans: Sequence[ShardPlan]
) -> Iterator[list["LayerWriter"]]:
    """A writer of the same shards in each folder."""
    with ExitStack() as stack:
        yield [stack.enter_context(LayerWriter(folder, plans)) for folder in folders]


class LayerWriter:
    """The shards of one layer as one: a tensor goes to the shard that was planned for it."""

    def __init__(self, folder: Path, plans: Sequence[ShardPlan]) -> None:
        self._folder, self._plans = folder, plans
        self._shards: list[ShardWriter] = []
        self._by_name: dict[str, ShardWriter] = {}
        self._lock = threading.Lock()
        self._written = 0

    def __enter__(self) -> "LayerWriter":
        for plan in self._plans:
            shard = ShardWriter(self._folder, plan)
            self._shards.append(shard)
            self._by_name |= dict.fromkeys(plan.sizes, shard)
        return self

    def __exit__(self, *_: object) -> None:
        for shard in self._shards:
            shard.close()

    def write(self, name: str, tensor: torch.Tensor, offset: int = 0) -> None:
        """Write a tensor, or a part of one that begins ``offset`` bytes into it."""
        data = tensor_bytes(tensor.cpu().contiguous())
        self._by_name[name].write(name, data, offset)
        with self._lock:
            self._written += len(data)

    def take_count(self) -> int:
        """Bytes written since this was last asked."""
        with self._lock:
            count, self._written = self._written, 0
        return count

    def commit(self) -> None:
        """Give all shards their final names."""
        for shard in self._shards:
            shard.commit()
