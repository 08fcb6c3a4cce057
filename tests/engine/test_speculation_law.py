"""Speculation changes no law: chi-square of the first tokens against the target's own distribution.

A random language model of four words, in which the next word depends on the last; tokens that one
verification does not give are drawn plainly, as the next steps would.
"""

from collections.abc import Callable

import pytest
import torch

from fourge.engine.distributions import cut
from fourge.engine.randomness import draw
from fourge.engine.speculation import verify

WORDS, SAMPLES, LENGTH = 4, 100_000, 4
# Quantile 0.9999 of chi-square with 4^4 - 1 degrees of freedom, by Wilson and Hilferty.
DEGREES = WORDS**LENGTH - 1
LIMIT = DEGREES * (1 - 2 / (9 * DEGREES) + 3.719 * (2 / (9 * DEGREES)) ** 0.5) ** 3

Table = torch.Tensor  # [WORDS, WORDS]: the distribution after each word


def random_table(seed: int, *, temperature: float = 1.0, top_p: float = 1.0) -> Table:
    logits = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(seed))
    return cut(
        logits, temperature=[temperature] * WORDS, min_p=[0.0] * WORDS, top_k=[0] * WORDS,
        top_p=[top_p] * WORDS,
    )  # fmt: skip


def certain(table: Table) -> Table:
    return torch.nn.functional.one_hot(table.argmax(-1), WORDS).float()


TARGETS: dict[str, Table] = {
    "plain": random_table(1),
    "top_p": random_table(1, top_p=0.7),
    "greedy": random_table(1, temperature=0.0),
}
DRAFTS: dict[str, Callable[[Table], Table]] = {
    "near": lambda target: 0.7 * target + 0.3 * random_table(2),
    "same": lambda target: target,
    "far": lambda target: random_table(3, temperature=0.5),
    "adversarial": lambda target: certain(-target),
    "certain": certain,
}


def speculate(
    target: Table, draft: Table, num_drafts: int, *, block: bool, u: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first words of many texts that begin after word 0, and how many drafts stood in each."""
    last = torch.zeros(SAMPLES, dtype=torch.long)
    drafts, rows = [], [last]
    for _ in range(num_drafts):
        drafts.append(draw(draft[rows[-1]], u(SAMPLES)))
        rows.append(drafts[-1])
    history = torch.stack(rows, 1)
    verdict = verify(
        target[history],
        torch.stack(drafts, 1),
        draft[history[:, :-1]],
        u(SAMPLES, num_drafts),
        u(SAMPLES, num_drafts + 1),
        block=block,
    )
    words = torch.zeros(SAMPLES, max(LENGTH, num_drafts + 1), dtype=torch.long)
    last = torch.zeros(SAMPLES, dtype=torch.long)
    for place in range(words.shape[1]):
        plain = draw(target[last], u(SAMPLES))
        drafted = drafts[place] if place < num_drafts else plain
        last = torch.where(place < verdict.accepted_B, drafted, plain)
        last = torch.where(place == verdict.accepted_B, verdict.token_B, last)
        words[:, place] = last
    return words[:, :LENGTH], verdict.accepted_B


def chi_square(words: torch.Tensor, target: Table) -> float:
    expected = torch.ones(1, dtype=torch.float64)
    last = torch.zeros(1, dtype=torch.long)
    for _ in range(LENGTH):
        expected = (expected[:, None] * target[last].double()).flatten()
        last = torch.arange(len(expected)) % WORDS
    place_values = WORDS ** torch.arange(LENGTH - 1, -1, -1)
    counts = torch.bincount((words * place_values).sum(-1), minlength=len(expected)).double()
    impossible = expected == 0
    assert counts[impossible].sum() == 0
    expected = (expected * SAMPLES)[~impossible]
    return ((counts[~impossible] - expected) ** 2 / expected).sum().item()


@pytest.fixture
def u() -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.rand(shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("block", [False, True], ids=["standard", "block"])
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("target", TARGETS)
def test_the_law_is_the_targets(
    target: str, draft: str, block: bool, u: Callable[..., torch.Tensor]
) -> None:
    table = TARGETS[target]
    words, _ = speculate(table, DRAFTS[draft](table), 3, block=block, u=u)
    assert chi_square(words, table) < LIMIT


def test_the_test_notices_a_draft_that_was_drawn_from_something_else(
    u: Callable[..., torch.Tensor],
) -> None:
    table = TARGETS["plain"]
    near = DRAFTS["near"](table)
    honest = verify

    def dishonest(target, drafts, probs, *rest, **options):
        return honest(target, drafts, probs.square(), *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(speculate.__globals__, "verify", dishonest)
        words, _ = speculate(table, near, 3, block=False, u=u)
    assert chi_square(words, table) > LIMIT


def test_the_same_distribution_accepts_all_and_a_disjoint_one_nothing(
    u: Callable[..., torch.Tensor],
) -> None:
    table = TARGETS["plain"]
    for block in (False, True):
        _, accepted = speculate(table, table, 3, block=block, u=u)
        assert accepted.min() == 3
        half = torch.zeros(WORDS, WORDS)
        half[:, :2] = 0.5
        _, accepted = speculate(half, half.flip(-1), 3, block=block, u=u)
        assert accepted.max() == 0


def test_blocks_keep_at_least_as_many_drafts(u: Callable[..., torch.Tensor]) -> None:
    table = TARGETS["plain"]
    for draft in ("near", "far"):
        own = DRAFTS[draft](table)
        _, standard = speculate(table, own, 3, block=False, u=u)
        _, block = speculate(table, own, 3, block=True, u=u)
        assert block.double().mean() > standard.double().mean()


def test_nothing_follows_a_draft_that_is_none() -> None:
    target = torch.full((1, 3, WORDS), 0.25)
    probs = torch.zeros(1, 2, WORDS)
    probs[0, 0, 2] = 1.0
    for block in (False, True):
        verdict = verify(
            target, torch.tensor([[2, -1]]), probs, torch.zeros(1, 2), torch.full((1, 3), 0.6),
            block=block,
        )  # fmt: skip
        assert (verdict.accepted_B.item(), verdict.token_B.item()) == (1, 2)
