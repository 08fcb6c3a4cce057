"""From positions to figures: means, quantiles, perplexity, by kind and by place, with intervals.

Every mean is a float64 sum over scored positions: all but the last of a window, which nothing
follows. Intervals: percentile bootstrap over windows (Efron), which are what was drawn at random;
two candidates are compared by the differences of the same windows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fourge.evaluate.divergence import Positions

RESAMPLES = 2000
# Of a window and a stream, in the record: as values and as text. 900 measured.
WINDOW_BYTES = 1024
# Windows that are drawn at a time: all resamples of thousands of windows would take gigabytes.
DRAWN = 1 << 20
INTERVAL = (2.5, 97.5)  # percent
FIRST_BUCKET = 16  # positions; every further bucket ends at twice the last one's end
QUANTILES = {"kl_median": 0.5, "kl_p95": 0.95, "kl_p99": 0.99, "kl_max": 1.0}


@dataclass(frozen=True)
class Windows:
    """Where positions belong: of each window its kind and its length in tokens."""

    kinds: tuple[str, ...]
    kind_W: np.ndarray  # int, index into kinds
    length_W: np.ndarray

    @property
    def place_T(self) -> np.ndarray:
        """Position within its window, of every token."""
        return np.concatenate([np.arange(length) for length in self.length_W])

    @property
    def window_T(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.length_W)), self.length_W)

    @property
    def scored_T(self) -> np.ndarray:
        """Whether a token follows within the window."""
        return self.place_T < np.repeat(self.length_W, self.length_W) - 1


def lane_figures(
    positions: Positions, windows: Windows, *, index_topk: int | None, seed: int
) -> dict:
    """All figures of one candidate in one lane; ``index_topk`` None: attention is not sparse."""
    place_T, window_T, scored_T = windows.place_T, windows.window_T, windows.scored_T
    beyond_T = place_T >= (math.inf if index_topk is None else index_topk)
    per_window = _per_window(positions, windows)
    return {
        **summarize(positions, scored_T),
        "kl_mean_interval": interval(per_window, "kl_mean", seed=seed),
        "windows": len(windows.length_W),
        "by_kind": {
            kind: summarize(positions, scored_T & (windows.kind_W == number)[window_T])
            for number, kind in enumerate(windows.kinds)
        },
        "by_position": [
            {"first": first, "last": last}
            | summarize(positions, scored_T & (place_T >= first) & (place_T <= last))
            for first, last in buckets(int(windows.length_W.max()) - 1)
        ],
        "within_topk": summarize(positions, scored_T & ~beyond_T),
        "beyond_topk": summarize(positions, scored_T & beyond_T),
        "per_window": per_window,
    }


def summarize(positions: Positions, chosen_T: np.ndarray) -> dict:
    """The plain figures of the chosen positions; null where there are none."""
    kl, count = positions.kl[chosen_T], int(chosen_T.sum())
    if not count:
        names = ("kl_mean", *QUANTILES, "top1", "ppl_reference", "ppl_candidate")
        return {"tokens": 0, **dict.fromkeys(names)}
    return {
        "tokens": count,
        "kl_mean": float(kl.mean()),
        **{name: float(np.quantile(kl, share)) for name, share in QUANTILES.items()},
        "top1": float(positions.agrees[chosen_T].mean()),
        "ppl_reference": float(np.exp(positions.nll_reference[chosen_T].mean())),
        "ppl_candidate": float(np.exp(positions.nll_candidate[chosen_T].mean())),
    }


def buckets(positions: int) -> list[tuple[int, int]]:
    """(first, last) of buckets that cover ``positions`` places, each ending at a power of two."""
    ends = [FIRST_BUCKET]
    while ends[-1] < positions:
        ends.append(2 * ends[-1])
    return [(first, end - 1) for first, end in zip([0, *ends[:-1]], ends, strict=True)]


def interval(per_window: Sequence[Mapping], key: str, *, seed: int) -> list[float]:
    """95 % interval of the token-weighted mean of ``key`` over windows."""
    values = np.array([window[key] for window in per_window])
    weights = np.array([window["tokens"] for window in per_window], dtype=np.float64)
    chance, rows = np.random.default_rng(seed), max(1, DRAWN // len(values))
    means = []
    for first in range(0, RESAMPLES, rows):
        size = (min(rows, RESAMPLES - first), len(values))
        drawn = chance.integers(len(values), size=size)
        means.append((values * weights)[drawn].sum(-1) / weights[drawn].sum(-1))
    return [float(bound) for bound in np.percentile(np.concatenate(means), INTERVAL)]


def paired(ours: Sequence[Mapping], theirs: Sequence[Mapping], *, seed: int) -> dict:
    """Mean KL of ours minus theirs over the same windows, with its interval: below zero throughout
    means that ours is closer to the reference.
    """
    differences = [
        {"tokens": mine["tokens"], "kl_mean": mine["kl_mean"] - other["kl_mean"]}
        for mine, other in zip(ours, theirs, strict=True)
    ]
    tokens = sum(one["tokens"] for one in differences)
    return {
        "difference": sum(one["kl_mean"] * one["tokens"] for one in differences) / tokens,
        "interval": interval(differences, "kl_mean", seed=seed),
        "windows": len(differences),
    }


def _per_window(positions: Positions, windows: Windows) -> list[dict]:
    records, start = [], 0
    for kind, length in zip(windows.kind_W, windows.length_W, strict=True):
        rows = slice(start, start + int(length) - 1)
        records.append(
            {
                "kind": windows.kinds[kind],
                "tokens": int(length) - 1,
                "kl_mean": float(positions.kl[rows].mean()),
                "top1": float(positions.agrees[rows].mean()),
                "nll_reference": float(positions.nll_reference[rows].mean()),
                "nll_candidate": float(positions.nll_candidate[rows].mean()),
            }
        )
        start += int(length)
    return records
