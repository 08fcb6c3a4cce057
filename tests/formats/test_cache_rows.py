"""Bytes of the compressed cache, against their layout written out by hand."""

import ml_dtypes
import numpy as np
import pytest
import torch

from fourge.formats import cache_rows


def by_hand(values: np.ndarray) -> tuple[np.ndarray, np.float32]:
    ratio = max(np.abs(values).max() / 448, 1e-4)
    scale = np.float32(2.0 ** np.ceil(np.log2(ratio)))
    return (values / scale).astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scale


def test_a_latent_row_of_glm_has_656_bytes_in_their_places() -> None:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(512, generator=generator) * torch.logspace(-8, 3, 512)
    rotated = torch.randn(64, generator=generator)
    row = cache_rows.pack_latents(latent, rotated).numpy()
    assert len(row) == 656 == cache_rows.latent_row_bytes(512, 64)
    for group in range(4):
        codes, scale = by_hand(latent[128 * group : 128 * (group + 1)].numpy())
        assert (row[128 * group : 128 * (group + 1)] == codes).all()
        assert row[512:528].view(np.float32)[group] == scale
    assert (row[528:].view(np.uint16) == rotated.bfloat16().view(torch.uint16).numpy()).all()


@pytest.mark.parametrize(("latent", "rotated"), [(512, 64), (32, 8), (160, 16)])
def test_rows_come_back_within_the_rounding(latent: int, rotated: int) -> None:
    values, turned = torch.randn(5, latent), torch.randn(5, rotated).bfloat16().float()
    row = cache_rows.pack_latents(values, turned)
    assert row.shape == (5, cache_rows.latent_row_bytes(latent, rotated))
    back = cache_rows.unpack_latents(row, latent, rotated)
    assert torch.equal(back[:, latent:], turned)
    # Three bits of mantissa: half a step of 1/8, and subnormals below 2^-6 of a scale up to 2^-6.
    assert ((back[:, :latent] - values).abs() <= values.abs() / 16 + 2.0**-15).all()


def test_a_page_of_index_keys_has_its_values_first_and_then_its_scales() -> None:
    keys = torch.randn(64, 128) * torch.logspace(-3, 3, 64)[:, None]
    codes, scales = cache_rows.pack_index_keys(keys)
    assert (codes.shape, scales.shape) == ((64, 128), (64, 4))
    page = torch.cat([codes.flatten(), scales.flatten()])
    assert len(page) == 8448 == cache_rows.index_page_bytes(128)
    for token in (0, 17, 63):
        expected, scale = by_hand(keys[token].numpy())
        assert (page[128 * token : 128 * (token + 1)].numpy() == expected).all()
        assert page[8192 + 4 * token : 8196 + 4 * token].numpy().view(np.float32)[0] == scale
    (back,) = cache_rows.unpack_index_pages(page[None], 128)
    assert ((back - keys).abs() <= keys.abs().amax(-1, keepdim=True) / 16).all()
