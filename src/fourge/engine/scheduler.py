"""Who takes part in the next step, within a budget of tokens and pages.

Decoding requests go first, all of them; what is left of the budget goes to prompts in the order of
arrival, cut where it ends. A request is let in with the pages for all its tokens, and only if a
page for every running one stays. When a decoding request finds no page, the latest arrival gives
its pages back and will be computed anew: the oldest always goes on, and one sequence of the
greatest length fits the cache alone (options.py), so there is always progress. A token in flight
counts like any other; a request that ends with it, by length, takes no part any more.
"""

from bisect import insort
from time import monotonic

from fourge.engine.pages import PagePool, first_digest, next_digest, pages_for
from fourge.engine.request import Chunk, Request
from fourge.formats.cache_rows import PAGE_TOKENS


def _by_arrival(request: Request) -> int:
    return request.arrival


class Scheduler:
    """Holds the waiting and the running requests, and their pages."""

    def __init__(
        self, pool: PagePool, *, max_num_seqs: int, max_num_batched_tokens: int, lookahead: int,
        reuse_prefixes: bool,
    ) -> None:  # fmt: skip
        self.pool = pool
        self.waiting: list[Request] = []  # both in the order of arrival
        self.running: list[Request] = []
        self._max_running, self._max_tokens = max_num_seqs, max_num_batched_tokens
        self._lookahead, self._reuse_prefixes = lookahead, reuse_prefixes

    def add(self, request: Request) -> None:
        """Wait for a place."""
        insort(self.waiting, request, key=_by_arrival)

    def remove(self, request: Request) -> None:
        """The request has ended, wherever it is; its pages are free."""
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)

    def schedule(self) -> list[Chunk]:
        """The next step; empty only if no request is left, but for those that wait for a step in
        flight.
        """
        chunks: list[Chunk] = []
        budget, preempted = self._max_tokens, False
        for request in [one for one in self.running if _left(one) == 1 and not _is_over(one)]:
            if request not in self.running:
                continue  # preempted for an earlier one
            if not self._grow(request):
                preempted = True
                continue
            chunks.append(_chunk(request, budget))
            budget -= chunks[-1].num_tokens
        for request in self.running:
            if _left(request) > 1:
                budget = self._continue(request, budget, chunks)
        # Whoever was preempted would only come back to be preempted again.
        while not preempted and self.waiting and len(self.running) < self._max_running and budget:
            request = self.waiting[0]
            if not self._admit(request):
                break
            budget = self._continue(request, budget, chunks)
        return chunks

    def committed(self, request: Request) -> None:
        """Publish the pages that are complete by now."""
        if not self._reuse_prefixes:
            return
        self._extend_digests(request, request.num_computed // PAGE_TOKENS)
        for number in range(request.num_published, request.num_computed // PAGE_TOKENS):
            self.pool.publish(request.pages[number], request.digests[number])
        request.num_published = request.num_computed // PAGE_TOKENS

    def _continue(self, request: Request, budget: int, chunks: list[Chunk]) -> int:
        chunk = _chunk(request, budget)
        if chunk.num_committed:
            chunks.append(chunk)
            budget -= chunk.num_tokens
        return budget

    def _grow(self, request: Request) -> bool:
        """Pages for a decoding request's next step; False if it had to give way itself."""
        needed = pages_for(request.length + self._lookahead) - len(request.pages)
        while needed > 0:
            pages = self.pool.allocate(needed)
            if pages is not None:
                request.pages += pages
                break
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.num_computed, request.num_predicted, request.num_published = 0, 1, 0
        request.num_preemptions += 1
        self.add(request)

    def _release(self, request: Request) -> None:
        self.pool.free(request.pages)
        request.pages = []

    def _admit(self, request: Request) -> bool:
        known = self._known_prefix(request)
        self.pool.hold(known)
        needed = pages_for(request.length + self._lookahead) - len(known)
        spare = len(self.running)
        pages = self.pool.allocate(needed) if self.pool.num_free >= needed + spare else None
        if pages is None:
            self.pool.free(known)
            return False
        self.waiting.pop(0)
        insort(self.running, request, key=_by_arrival)
        request.pages = known + pages
        request.num_computed = request.num_predicted = len(known) * PAGE_TOKENS
        request.num_predicted = max(1, request.num_predicted)
        request.num_published = len(known)
        if not request.num_preemptions:
            request.num_cached = request.num_computed
            request.scheduled_s = monotonic()
        return True

    def _known_prefix(self, request: Request) -> list[int]:
        """Pages with the request's first tokens; at least one token is left to compute."""
        if not self._reuse_prefixes or request.params.prompt_logprobs is not None:
            return []
        count = (len(request.tokens) - 1) // PAGE_TOKENS
        self._extend_digests(request, count)
        return self.pool.find(request.digests[:count])

    def _extend_digests(self, request: Request, count: int) -> None:
        for number in range(len(request.digests), count):
            before = request.digests[-1] if number else first_digest(request.params.cache_salt)
            page = request.tokens[number * PAGE_TOKENS : (number + 1) * PAGE_TOKENS]
            request.digests.append(next_digest(before, page))


def _left(request: Request) -> int:
    return request.length - request.num_computed


def _is_over(request: Request) -> bool:
    """Whether its last token is on its way."""
    return request.length >= request.max_length


def _chunk(request: Request, budget: int) -> Chunk:
    """As much as the budget allows; drafts go only together with the newest token."""
    left, drafts = _left(request), tuple(request.drafts)
    if left + len(drafts) <= budget:
        return Chunk(request, request.num_computed, left, drafts, samples=True)
    return Chunk(request, request.num_computed, min(left - 1, budget), (), samples=False)
