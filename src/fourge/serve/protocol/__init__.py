"""What clients may send: one model per request, checked once, at the border.

A field that nobody knows is refused, and so is one that is known and not supported; both are named.
null is the same as absent, as the official clients have it.
"""
