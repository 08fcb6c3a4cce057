"""What a client may ask of the server, and for how long."""

from collections.abc import Callable
from dataclasses import dataclass

from fourge.serve.errors import ApiError

RETRY_AFTER_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """All of them can be set on the command line."""

    max_body_bytes: int = 32 << 20
    max_messages: int = 4096
    max_choices: int = 16  # n, times the prompts of a completion
    max_waiting: int = 256  # answers beyond those that the engine works on
    request_timeout_s: float = 3600.0
    body_timeout_s: float = 60.0
    ping_interval_s: float = 15.0  # comments in a silent stream, for proxies
    drain_s: float = 30.0


class Admission:
    """Counts answers under way; there are at most ``most``."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0

    def take(self, number: int) -> Callable[[], None]:
        """Room for so many answers, and how to give it back, which may be done twice. ApiError 429
        if there is none."""
        if self.taken + number > self.most:
            raise ApiError(
                429, f"{self.taken} answers are under way, and at most {self.most} may be: try"
                " again later.", code="queue_full", retry_after_s=RETRY_AFTER_S,
            )  # fmt: skip
        self.taken += number
        left = number

        def give_back() -> None:
            nonlocal left
            self.taken -= left
            left = 0

        return give_back
