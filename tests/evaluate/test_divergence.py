"""KL over pieces of the vocabulary equals the direct computation, whatever the pieces."""

import numpy as np
import pytest
import torch

from fourge.evaluate.divergence import Divergence

TOKENS, VOCABULARY = 40, 97


def logits(seed: int, *, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, VOCABULARY, generator=generator) * scale


def direct_kl(reference_TV: torch.Tensor, candidate_TV: torch.Tensor) -> torch.Tensor:
    p, q = (one.double().log_softmax(-1) for one in (reference_TV, candidate_TV))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("piece", [1, 10, 96, 97, 200])
@pytest.mark.parametrize("chunk", [7, 40])
def test_pieces_give_the_direct_figures(piece: int, chunk: int):
    reference, near, far = logits(0), logits(0) + 0.1 * logits(1), logits(2)
    # Growing along the vocabulary, so that every piece brings a new largest logit.
    reference += torch.arange(VOCABULARY) * 0.3
    targets = torch.arange(TOKENS) * 2 % VOCABULARY
    divergence = Divergence(targets, ["near", "far"])
    for first in range(0, VOCABULARY, piece):
        columns = slice(first, first + piece)
        for start in range(0, TOKENS, chunk):
            rows = slice(start, min(start + chunk, TOKENS))
            divergence.add(
                rows,
                first,
                reference[rows, columns],
                {"near": near[rows, columns], "far": far[rows, columns]},
            )
    for name, candidate in (("near", near), ("far", far)):
        found = divergence.positions(name)
        np.testing.assert_allclose(found.kl, direct_kl(reference, candidate), atol=1e-12)
        assert (found.agrees == (reference.argmax(-1) == candidate.argmax(-1)).numpy()).all()
        for nll, of in ((found.nll_reference, reference), (found.nll_candidate, candidate)):
            wanted = torch.nn.functional.cross_entropy(of.double(), targets, reduction="none")
            np.testing.assert_allclose(nll, wanted, atol=1e-12)


def test_kl_of_equal_logits_is_zero_and_of_others_is_not():
    reference = logits(3)
    divergence = Divergence(torch.zeros(TOKENS, dtype=torch.int64), ["same", "shifted", "other"])
    candidates = {"same": reference, "shifted": reference + 5, "other": logits(4)}
    divergence.add(slice(0, TOKENS), 0, reference, candidates)
    assert np.abs(divergence.positions("same").kl).max() == 0
    assert np.abs(divergence.positions("shifted").kl).max() < 1e-6
    assert divergence.positions("other").kl.min() > 0.1


def test_the_direction_is_from_the_reference():
    """A candidate that spreads what the reference is sure of: KL(ref || candidate) = log V."""
    reference = torch.zeros(1, VOCABULARY)
    reference[0, 5] = 200.0
    divergence = Divergence(torch.tensor([5]), ["flat"])
    divergence.add(slice(0, 1), 0, reference, {"flat": torch.zeros(1, VOCABULARY)})
    assert divergence.positions("flat").kl[0] == pytest.approx(np.log(VOCABULARY))
