"""Figures from positions: which count, how they are grouped, how sure one may be."""

import tracemalloc

import numpy as np
import pytest

from fourge.evaluate.divergence import Positions
from fourge.evaluate.figures import Windows, buckets, interval, lane_figures, paired, summarize

# Two kinds; the last token of a window has no successor and is never scored.
WINDOWS = Windows(("chat", "code"), np.array([0, 1, 1]), np.array([4, 3, 2]))
KL = np.array([0.1, 0.2, 0.3, 99, 0.4, 0.5, 99, 0.6, 99])


def positions(kl: np.ndarray = KL) -> Positions:
    return Positions(kl, kl < 0.45, np.full(len(kl), 1.0), np.full(len(kl), 2.0))


def test_the_last_token_of_a_window_is_not_scored():
    figures = lane_figures(positions(), WINDOWS, index_topk=None, seed=0)
    assert figures["tokens"] == 6
    assert figures["windows"] == 3
    assert figures["kl_mean"] == pytest.approx(2.1 / 6)
    assert figures["kl_max"] == pytest.approx(0.6)
    assert figures["kl_median"] == pytest.approx(0.35)
    assert figures["top1"] == pytest.approx(4 / 6)
    assert figures["ppl_reference"] == pytest.approx(np.e)
    assert figures["ppl_candidate"] == pytest.approx(np.e**2)


def test_kinds_and_windows_share_the_positions_out():
    figures = lane_figures(positions(), WINDOWS, index_topk=None, seed=0)
    assert figures["by_kind"]["chat"]["kl_mean"] == pytest.approx(0.2)
    assert figures["by_kind"]["code"]["kl_mean"] == pytest.approx(0.5)
    assert [one["tokens"] for one in figures["per_window"]] == [3, 2, 1]
    assert [one["kind"] for one in figures["per_window"]] == ["chat", "code", "code"]
    assert figures["per_window"][1]["kl_mean"] == pytest.approx(0.45)


def test_positions_beyond_index_topk_stand_apart():
    """index_topk 2: a query at place 2 is the first that cannot attend to everything."""
    figures = lane_figures(positions(), WINDOWS, index_topk=2, seed=0)
    assert figures["beyond_topk"]["tokens"] == 1
    assert figures["beyond_topk"]["kl_mean"] == pytest.approx(0.3)
    assert figures["within_topk"]["tokens"] == 5
    dense = lane_figures(positions(), WINDOWS, index_topk=None, seed=0)
    assert dense["beyond_topk"]["tokens"] == 0
    assert dense["beyond_topk"]["kl_mean"] is None


def test_buckets_double_and_cover_every_position():
    assert buckets(1) == [(0, 15)]
    assert buckets(16) == [(0, 15)]
    assert buckets(17) == [(0, 15), (16, 31)]
    assert buckets(65) == [(0, 15), (16, 31), (32, 63), (64, 127)]


def test_buckets_hold_what_they_say():
    length = 40
    windows = Windows(("text",), np.array([0]), np.array([length]))
    kl = np.arange(length, dtype=float)
    figures = lane_figures(positions(kl), windows, index_topk=None, seed=0)
    first, second, third = figures["by_position"]
    assert (first["tokens"], second["tokens"], third["tokens"]) == (16, 16, 7)
    assert third["kl_mean"] == pytest.approx(np.arange(32, 39).mean())


def test_nothing_chosen_gives_null_and_not_nan():
    figures = summarize(positions(), np.zeros(len(KL), dtype=bool))
    assert figures["tokens"] == 0
    assert {value for key, value in figures.items() if key != "tokens"} == {None}


def test_intervals_hold_the_truth_as_often_as_they_say():
    """95 % intervals of 300 samples of 40 windows; the bootstrap is a little narrow at this size"""
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        windows = [{"tokens": 100, "kl_mean": value} for value in generator.normal(0.03, 0.007, 40)]
        low, high = interval(windows, "kl_mean", seed=trial)
        hits += low <= 0.03 <= high
    assert 0.90 < hits / 300 < 0.98


def test_windows_count_by_their_tokens():
    windows = [{"tokens": 900, "kl_mean": 1.0}, {"tokens": 100, "kl_mean": 0.0}]
    assert paired(windows, [{"tokens": 900, "kl_mean": 0.0}] * 2, seed=0)["difference"] == 0.9


def test_pairing_sees_a_difference_that_the_spread_of_windows_hides():
    generator = np.random.default_rng(1)
    values = generator.normal(0.03, 0.007, 40)
    theirs = [{"tokens": 50, "kl_mean": value} for value in values]
    ours = [{"tokens": 50, "kl_mean": value - 0.0005} for value in values]
    result = paired(ours, theirs, seed=0)
    assert result["difference"] == pytest.approx(-0.0005)
    assert result["interval"][1] < 0
    assert result["windows"] == 40
    # Alone, the two intervals overlap.
    assert interval(ours, "kl_mean", seed=0)[1] > interval(theirs, "kl_mean", seed=0)[0]


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(2).normal(0.03, 0.007, 40)
    windows = [{"tokens": 1, "kl_mean": value} for value in values]
    assert interval(windows, "kl_mean", seed=3) == interval(windows, "kl_mean", seed=3)
    assert interval(windows, "kl_mean", seed=3) != interval(windows, "kl_mean", seed=4)


def test_intervals_of_many_windows_take_little_memory():
    """All resamples at once would take 320 MB for each of three arrays."""
    windows = [{"tokens": 1 + number % 7, "kl": number % 3} for number in range(20_000)]
    tracemalloc.start()
    low, high = interval(windows, "kl", seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 64 << 20
    assert 0.98 < low < 1 < high < 1.02
