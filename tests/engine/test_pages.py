"""The page pool against a plain model of it, after thousands of random operations."""

import random
from collections import Counter

import pytest

from fourge.engine.pages import PagePool, first_digest, next_digest, pages_for


def chain(tokens: list[int], salt: str = "") -> list[bytes]:
    """Digests of pages of one token each; the pool does not look at tokens."""
    digests, before = [], first_digest(salt)
    for token in tokens:
        before = next_digest(before, [token])
        digests.append(before)
    return digests


def test_a_digest_depends_on_every_token_before_and_on_the_salt() -> None:
    assert chain([1, 2, 3])[:2] == chain([1, 2, 4])[:2]
    assert chain([1, 2, 3])[2] != chain([1, 2, 4])[2]
    assert chain([1, 2, 3])[2] != chain([0, 2, 3])[2]
    assert chain([1], "a") != chain([1], "b")


def test_all_pages_but_the_first_are_given_out_once() -> None:
    pool = PagePool(5)
    pages = pool.allocate(4)
    assert pages is not None
    assert sorted(pages) == [1, 2, 3, 4]
    assert pool.allocate(1) is None
    pool.free(pages)
    assert pool.num_free == 4


def test_a_page_without_a_prefix_goes_before_known_ones_and_the_oldest_of_those_first() -> None:
    pool = PagePool(4)
    pages = pool.allocate(3)
    assert pages is not None
    old, new, plain = pages
    first, second = chain([1])[0], chain([2])[0]
    pool.publish(old, first)
    pool.publish(new, second)
    pool.free([old])
    pool.free([new])
    pool.free([plain])
    assert pool.allocate(1) == [plain]
    assert pool.allocate(1) == [old]
    assert pool.find([first]) == []
    assert pool.find([second]) == [new]


def test_the_last_page_of_a_sequence_is_given_up_first() -> None:
    pool = PagePool(4)
    pages = pool.allocate(3)
    assert pages is not None
    digests = chain([1, 2, 3])
    for page, digest in zip(pages, digests, strict=True):
        pool.publish(page, digest)
    pool.free(pages)
    assert pool.allocate(1) == [pages[2]]
    assert pool.find(digests) == pages[:2]


def test_freeing_what_nobody_holds_is_a_bug() -> None:
    pool = PagePool(3)
    pages = pool.allocate(1)
    assert pages is not None
    pool.free(pages)
    with pytest.raises(AssertionError, match="freed more often"):
        pool.free(pages)


@pytest.mark.parametrize("seed", range(3))
def test_references_and_contents_are_right_after_thousands_of_operations(seed: int) -> None:
    """Sequences come with prefixes of a small alphabet, share pages, grow and leave. A dictionary
    of what was written to each page tells whether a page that is found holds what was asked for.
    """
    choose = random.Random(seed)
    pool = PagePool(24)
    content: dict[int, bytes] = {}
    alive: list[list[int]] = []
    found_pages = 0
    for _ in range(4000):
        if choose.random() < 0.55:
            digests = chain([choose.randrange(2) for _ in range(choose.randrange(1, 8))])
            known = pool.find(digests)
            assert [content[page] for page in known] == digests[: len(known)]
            pool.hold(known)
            fresh = pool.allocate(len(digests) - len(known))
            if fresh is None:
                assert len(digests) - len(known) > pool.num_free
                pool.free(known)
                continue
            found_pages += len(known)
            for page, digest in zip(fresh, digests[len(known) :], strict=True):
                content[page] = digest
                if choose.random() < 0.8:
                    pool.publish(page, digest)
            alive.append(known + fresh)
        elif alive:
            pool.free(alive.pop(choose.randrange(len(alive))))
        held = Counter(page for pages in alive for page in pages)
        assert all(pool.references(page) == held[page] for page in range(pool.num_pages))
        assert pool.num_free == pool.num_pages - 1 - len(held)
    assert found_pages > 1000
    for pages in alive:
        pool.free(pages)
    assert pool.num_free == pool.num_pages - 1


def test_pages_are_counted_up() -> None:
    assert [pages_for(count) for count in (0, 1, 64, 65)] == [0, 1, 1, 2]
