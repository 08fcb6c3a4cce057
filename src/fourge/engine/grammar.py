"""Masks of grammars at every place where a token may be chosen, drafts included.

A request's matcher stands after its last token. To mask the places after its drafts it takes them
one by one and goes back; after a draft that the grammar forbids nothing more is masked, since its
probability is 0 there and nothing after it can stand.
"""

from collections.abc import Sequence

import torch
import xgrammar

from fourge.engine.request import Chunk


def bitmasks(chunks: Sequence[Chunk], vocab_size: int) -> torch.Tensor | None:
    """int32 [places of all chunks, words], 1 is allowed; None where no request has a grammar."""
    if all(chunk.request.matcher is None for chunk in chunks):
        return None
    places = sum(len(chunk.drafts) + 1 for chunk in chunks)
    bitmask = xgrammar.allocate_token_bitmask(places, vocab_size)
    place = 0
    for chunk in chunks:
        _fill(chunk, bitmask, place)
        place += len(chunk.drafts) + 1
    return bitmask


def _fill(chunk: Chunk, bitmask: torch.Tensor, place: int) -> None:
    matcher = chunk.request.matcher
    if matcher is None or matcher.is_terminated():
        return
    matcher.fill_next_token_bitmask(bitmask, place)
    taken = 0
    for number, draft in enumerate(chunk.drafts, start=1):
        if not matcher.accept_token(draft):
            break
        taken += 1
        if matcher.is_terminated():
            break
        matcher.fill_next_token_bitmask(bitmask, place + number)
    if taken:
        matcher.rollback(taken)
