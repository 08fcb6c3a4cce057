"""The index pattern: length, letters, beginning, and models with a sharing of their own."""

import pytest

from fourge.errors import LaunchError
from fourge.launch import pattern

MTP = pattern.KNOWN + "F"


def test_published_patterns_pass():
    assert pattern.KNOWN.count("F") == 40
    assert pattern.fault(pattern.KNOWN) is None
    assert pattern.fault(MTP) is None


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (pattern.KNOWN[:-1], "77 letters"),
        (MTP + "F", "80 letters"),
        ("", "0 letters"),
        (pattern.KNOWN + "S", "last letter is S"),
        ("S" + pattern.KNOWN[1:], "first letter is S"),
        (pattern.KNOWN.lower(), "'f'"),
        (pattern.KNOWN[:-1] + " ", "' '"),
        (["F"] * 78, "list"),
    ],
)
def test_faults(bad: object, why: str):
    assert why in str(pattern.fault(bad))


def test_other_numbers_of_layers():
    assert pattern.fault("FSS", 3) is None
    assert pattern.fault("FSSF", 3) is None
    assert "needed are 3" in str(pattern.fault(pattern.KNOWN, 3))


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ({"indexer_types": ["full", "shared"]}, "indexer_types"),
        ({"index_topk_freq": 4, "index_topk_pattern": None}, "index_topk_freq"),
        ({"index_topk_pattern": "FS"}, "index_topk_pattern"),
        ({"indexer_types": ["full", "full"], "index_topk_freq": 1}, None),
        ({}, None),
    ],
)
def test_trained_sharing(raw: dict, key: str | None):
    assert pattern.trained(raw) == key
    if key is not None:
        with pytest.raises(LaunchError, match=f"config.json has {key}"):
            pattern.layer_kinds("FS", raw, 2)


def test_kinds_and_override_agree():
    kinds = pattern.layer_kinds(MTP, {}, 78)
    override = pattern.override(MTP)
    assert list(kinds) == override["indexer_types"]
    assert override["index_topk_pattern"] == pattern.KNOWN
    assert kinds.count("full") == 40
