"""The tensors of the paged cache: latents and index keys of every layer, the MTP layer included.

Pages of 64 tokens. "bf16" and "fp32" keep numbers as they are, "fp8" the 656-byte latent rows and
132-byte index keys of formats/cache_rows.py. A page of plain index keys holds number after number
of its 64 keys, so that scores of neighbours are computed side by side. A layer without an indexer
of its own keeps no index keys. Under speculation the last hidden state of every page is kept too,
since the MTP layer's first token after a reused prefix needs it. Memory: ``token_bytes`` a token,
touched as pages are used.
"""

import torch

from fourge.formats import cache_rows
from fourge.formats.cache_rows import PAGE_TOKENS
from fourge.models.config import ModelConfig
from fourge.models.decode import Rows
from fourge.models.mla import Latents

PLAIN_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def cached_layers(config: ModelConfig, *, mtp: bool) -> range:
    """The layers that have a cache."""
    return range(config.num_hidden_layers + (1 if mtp else 0))


def token_bytes(config: ModelConfig, kind: str, *, mtp: bool) -> int:
    """Bytes of all layers for one token (of a page's last hidden state, its share)."""
    layers = cached_layers(config, mtp=mtp)
    indexers = sum(config.has_indexer(layer) for layer in layers)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    if kind == "fp8":
        row = cache_rows.latent_row_bytes(config.kv_lora_rank, config.qk_rope_head_dim)
        index = cache_rows.index_page_bytes(config.index_head_dim) // PAGE_TOKENS
    else:
        itemsize = PLAIN_DTYPES[kind].itemsize
        row, index = width * itemsize, config.index_head_dim * itemsize
    hidden = 4 * config.hidden_size // PAGE_TOKENS if mtp else 0
    return len(layers) * row + indexers * index + hidden


class PagedCache:
    """Reads and writes tokens by slot (page * 64 + place in the page)."""

    def __init__(
        self, config: ModelConfig, *, kind: str, num_pages: int, mtp: bool, device: torch.device
    ) -> None:
        self._config, self._packed = config, kind == "fp8"
        # Attention computes in float32 on the CPU: there, BF16 products of ever changing lengths
        # would compile and keep a kernel each (see models/linear.py).
        self._read_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        dtype = torch.uint8 if self._packed else PLAIN_DTYPES[kind]
        width = config.kv_lora_rank + config.qk_rope_head_dim
        page_width = PAGE_TOKENS * config.index_head_dim
        if self._packed:
            width = cache_rows.latent_row_bytes(config.kv_lora_rank, config.qk_rope_head_dim)
            page_width = cache_rows.index_page_bytes(config.index_head_dim)
        if kind == "fp32":
            self._read_dtype = torch.float32

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        layers = cached_layers(config, mtp=mtp)
        self._latents = [zeros(num_pages * PAGE_TOKENS, width) for _ in layers]
        self._index_keys = [
            zeros(num_pages, page_width) if config.has_indexer(layer) else None for layer in layers
        ]
        self.last_hidden_PD = torch.zeros(
            num_pages if mtp else 0, config.hidden_size, dtype=torch.float32, device=device
        )

    def write(
        self, layer: int, slot_T: torch.Tensor, latents: Latents, key_TI: torch.Tensor | None
    ) -> None:
        """Keep T tokens; where slots repeat, any one of their tokens stays."""
        rows = self._latents[layer]
        if self._packed:
            packed = cache_rows.pack_latents(latents.latent_MLC, latents.rope_key_MLR)
            rows[slot_T] = packed
        else:
            rows[slot_T] = torch.cat([latents.latent_MLC, latents.rope_key_MLR], -1).to(rows.dtype)
        if key_TI is not None:
            self._write_index_keys(layer, slot_T, key_TI)

    @property
    def is_plain(self) -> bool:
        """Whether ``rows`` can be had: float32 on the CPU."""
        return self._latents[0].dtype == torch.float32 and self._latents[0].device.type == "cpu"

    def rows(self, layer: int) -> Rows:
        """The layer's memory itself, if it is plain."""
        index_keys = self._index_keys[layer]
        keys_LS = torch.empty(0) if index_keys is None else index_keys
        return Rows(self._latents[layer].numpy(), keys_LS.view(-1, PAGE_TOKENS).numpy())

    def read_latents(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        """[..., C + R] of slots of any shape."""
        rows = self._latents[layer].index_select(0, slots.flatten())
        if self._packed:
            config = self._config
            rows = cache_rows.unpack_latents(rows, config.kv_lora_rank, config.qk_rope_head_dim)
        return rows.to(self._read_dtype).unflatten(0, slots.shape)

    def read_index_keys(self, layer: int, page_MP: torch.Tensor) -> torch.Tensor:
        """float32 [M, P * 64, I]."""
        pages = self._index_keys[layer]
        assert pages is not None, f"layer {layer} has no index keys"
        rows = pages.index_select(0, page_MP.flatten())
        if self._packed:
            rows = cache_rows.unpack_index_pages(rows, self._config.index_head_dim)
        else:
            rows = rows.float().unflatten(1, (-1, PAGE_TOKENS)).mT
        return rows.reshape(len(page_MP), -1, self._config.index_head_dim)

    def _write_index_keys(self, layer: int, slot_T: torch.Tensor, key_TI: torch.Tensor) -> None:
        pages, size = self._index_keys[layer], self._config.index_head_dim
        assert pages is not None, f"layer {layer} has no index keys"
        page_T, place_T = slot_T // PAGE_TOKENS, slot_T % PAGE_TOKENS
        if not self._packed:
            pages.view(-1, size, PAGE_TOKENS)[page_T, :, place_T] = key_TI.to(pages.dtype)
            return
        codes, scales = cache_rows.pack_index_keys(key_TI)
        values = pages[:, : PAGE_TOKENS * size].unflatten(1, (PAGE_TOKENS, size))
        values[page_T, place_T] = codes
        pages[:, PAGE_TOKENS * size :].unflatten(1, (PAGE_TOKENS, 4))[page_T, place_T] = scales
