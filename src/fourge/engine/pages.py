"""Which page of the cache belongs to whom: reference counts, and reuse of prefixes.

A full page is known by the hash of its tokens and of all before it: digest = blake2b(digest of the
page before | tokens), the first one seeded with the request's salt. A page that nobody holds keeps
its contents until it is given out again, the one that was let go longest ago first, those without a
known prefix before all others. Knows no tensors; page 0 is never given out (rows that belong to
nobody are written there).
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from fourge.formats.cache_rows import PAGE_TOKENS

NOBODY = 0


def first_digest(salt: str) -> bytes:
    """What the hash chain begins with; requests of different salts share nothing."""
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()


def next_digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of a page of ``tokens`` that follows the page ``before``."""
    content = np.asarray(tokens, dtype=np.int64).tobytes()
    return hashlib.blake2b(before + content, digest_size=16).digest()


class PagePool:
    """Gives out pages 1..num_pages - 1."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._digest: dict[int, bytes] = {}
        self._page: dict[bytes, int] = {}
        self._plain = list(range(num_pages - 1, 0, -1))  # free, of no known prefix
        self._reusable: OrderedDict[int, None] = OrderedDict()  # free, oldest first

    @property
    def num_free(self) -> int:
        """Pages that can be had, those with reusable contents included."""
        return len(self._plain) + len(self._reusable)

    def allocate(self, count: int) -> list[int] | None:
        """Pages with one reference each; None, and nothing changes, if there are not so many."""
        if count > self.num_free:
            return None
        pages = [self._plain.pop() if self._plain else self._evict() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The pages of the longest known beginning of a chain; takes no reference."""
        pages = []
        for digest in digests:
            page = self._page.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """One more reference to each of pages that ``find`` found."""
        for page in pages:
            if self._references[page] == 0:
                del self._reusable[page]
            self._references[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """One reference less; the last pages of a sequence will be reused first."""
        for page in reversed(pages):
            assert self._references[page] > 0, f"page {page} is freed more often than held"
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._digest:
                self._reusable[page] = None
            else:
                self._plain.append(page)

    def publish(self, page: int, digest: bytes) -> None:
        """The held ``page`` is complete; the first page of a digest is the one that is found."""
        assert self._references[page] > 0, f"page {page} is not held"
        if digest not in self._page and page not in self._digest:
            self._page[digest], self._digest[page] = page, digest

    def references(self, page: int) -> int:
        """How many hold ``page``."""
        return self._references[page]

    def _evict(self) -> int:
        page, _ = self._reusable.popitem(last=False)
        del self._page[self._digest.pop(page)]
        return page


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE_TOKENS)
