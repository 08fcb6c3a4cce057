import re
from typing import Any

import pytest

from fourge.errors import ConfigError
from fourge.models.kinds import indexer_types, mlp_contradiction, mlp_types

# GLM-5.2, and IndexCache 1/2 for GLM-5: both are in the field.
PATTERN_5_2 = "FFF" + "SSSF" * 18 + "SSS"
PATTERN_5 = "FFSFSSSFSSFFFSSSFFFSFSSSSSSFFSFFSFFSSFFFFFFSFFFFFSFFSSSSSSFSFFFSFSSSFSFFSFFSSS"


def letters(types: tuple[str, ...]) -> str:
    return "".join({"full": "F", "shared": "S"}[kind] for kind in types)


def test_every_layer_is_full_when_no_key_says_anything() -> None:
    assert letters(indexer_types({}, 5)) == "FFFFF"
    assert letters(indexer_types({"indexer_types": None, "index_topk_pattern": None}, 3)) == "FFF"


def test_frequency_four_and_offset_three_give_the_pattern_of_glm_5_2() -> None:
    raw = {"index_topk_freq": 4, "index_skip_topk_offset": 3}
    assert letters(indexer_types(raw, 78)) == PATTERN_5_2


def test_the_offset_is_two_by_default() -> None:
    assert letters(indexer_types({"index_topk_freq": 3}, 9)) == "FFSSFSSFS"


@pytest.mark.parametrize("pattern", [PATTERN_5_2, PATTERN_5, PATTERN_5 + "F", list(PATTERN_5)])
def test_a_pattern_names_each_decoder_layer_and_may_name_the_mtp_layer(pattern: Any) -> None:
    assert letters(indexer_types({"index_topk_pattern": pattern}, 78)) == "".join(pattern)[:78]


@pytest.mark.parametrize("pattern", ["FS", "FSFFF", "FSFS", "FXF", "", "FSFSF", 3, ["F", 1, "S"]])
def test_a_pattern_of_another_length_or_alphabet_is_refused(pattern: object) -> None:
    with pytest.raises(ConfigError, match="3 letters F or S, or one more that is F"):
        indexer_types({"index_topk_pattern": pattern}, 3)


@pytest.mark.parametrize(
    "raw",
    [
        {"index_topk_pattern": "SFF"},
        {"indexer_types": ["shared", "full", "full"]},
        {"index_topk_freq": 2, "index_skip_topk_offset": 0},
    ],
)
def test_the_first_layer_must_be_full(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="none comes before it to share"):
        indexer_types(raw, 3)


def test_keys_that_agree_are_accepted_together() -> None:
    raw = {
        "indexer_types": ["full", "full", "shared", "full"],
        "index_topk_pattern": "FFSF",
        "index_topk_freq": 2,
    }
    assert letters(indexer_types(raw, 4)) == "FFSF"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (
            {"indexer_types": ["full"] * 4, "index_topk_pattern": "FFSF"},
            "indexer_types makes layer 2 'full' and index_topk_pattern makes it 'shared'",
        ),
        (
            {"index_topk_pattern": "FFFS", "index_topk_freq": 2},
            "index_topk_pattern makes layer 2 'full' and index_topk_freq makes it 'shared'",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        indexer_types(raw, 4)


@pytest.mark.parametrize(
    "raw",
    [
        {"indexer_types": ["full"] * 5},
        {"indexer_types": ["full", "F", "full", "full"]},
        {"indexer_types": "full"},
        {"index_topk_freq": 0},
        {"index_topk_freq": 2, "index_skip_topk_offset": -1},
    ],
)
def test_malformed_indexer_keys_are_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        indexer_types(raw, 4)


def test_mlp_types_come_from_either_key() -> None:
    expected = ("dense", "sparse", "sparse")
    assert mlp_types({"first_k_dense_replace": 1}, 3) == expected
    assert mlp_types({"mlp_layer_types": list(expected)}, 3) == expected
    assert mlp_types({"first_k_dense_replace": 9}, 2) == ("dense", "dense")
    assert mlp_types({"first_k_dense_replace": 0}, 2) == ("sparse", "sparse")


def test_mlp_layer_types_win_over_a_contradicting_count_and_the_user_is_told() -> None:
    raw = {"mlp_layer_types": ["dense", "sparse", "sparse"], "first_k_dense_replace": 3}
    assert mlp_types(raw, 3) == ("dense", "sparse", "sparse")
    assert "first_k_dense_replace 3 does not fit" in (mlp_contradiction(raw, 3) or "")
    assert mlp_contradiction(raw | {"first_k_dense_replace": 1}, 3) is None
    assert mlp_contradiction({"first_k_dense_replace": 1}, 3) is None


def test_mlp_types_must_be_given() -> None:
    with pytest.raises(ConfigError, match="first_k_dense_replace"):
        mlp_types({}, 3)
