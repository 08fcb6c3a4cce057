"""Shapes on disk."""

import pytest

from fourge.formats.layout import BLOCK_SIZE, packed_shape, scale_shape


def test_shapes_of_a_glm_5_gate_projection():
    assert BLOCK_SIZE == 16
    assert packed_shape((2048, 6144)) == (2048, 3072)
    assert scale_shape((2048, 6144)) == (2048, 384)


def test_outer_dimensions_are_kept():
    assert packed_shape([4, 3, 32]) == (4, 3, 16)
    assert scale_shape([4, 3, 32]) == (4, 3, 2)
    assert packed_shape((16,)) == (8,)


@pytest.mark.parametrize("shape_of", [packed_shape, scale_shape])
@pytest.mark.parametrize("shape", [(3, 40), (3, 8), ()])
def test_a_row_that_is_not_whole_blocks_is_refused(shape_of, shape):
    with pytest.raises(ValueError, match=r"in_features must be a multiple of 16; got shape \("):
        shape_of(shape)
