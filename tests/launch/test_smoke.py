"""What the smoke test makes of answers and metrics."""

import pytest

from fourge.launch.smoke import Call, _add, _sound, acceptance


def test_acceptance_of_vllm_is_that_of_the_first_position():
    metrics = """# HELP vllm:spec_decode_num_drafts_total x
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 100.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 100.0
vllm:spec_decode_num_drafts_created{engine="0"} 1.7e9
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 400.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 90.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",position="0"} 70.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="10"} 7.0
"""
    assert acceptance(metrics) == pytest.approx(0.8)


def test_acceptance_of_sglang():
    metrics = 'sglang:spec_accept_rate{tp_rank="0"} 0.5\nsglang:spec_accept_rate{tp_rank="1"} 0.7\n'
    assert acceptance(metrics) == pytest.approx(0.6)


@pytest.mark.parametrize("metrics", ["", "vllm:spec_decode_num_drafts_total 0.0\n"])
def test_no_drafts(metrics: str):
    assert acceptance(metrics) is None


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("The answer is 42.", True),
        ("41", False),
        ("42" + "!" * 16, False),
        ("42 ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! !", False),
        ("42 \N{REPLACEMENT CHARACTER}", False),
    ],
)
def test_damage_shows(text: str, passed: bool):
    assert _sound(text, "42")[0] is passed


def test_pieces_of_a_call_are_put_together():
    call = Call()
    deltas = [
        {"role": "assistant", "content": ""},
        {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": None}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]},
        {"tool_calls": [{"index": 1, "function": {"name": "g", "arguments": "{}"}}]},
    ]
    for delta in deltas:
        _add(call, {"choices": [{"delta": delta, "finish_reason": None}]})
    _add(call, {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]})
    _add(call, {"choices": [], "usage": {}})
    assert (call.name, call.arguments, call.finish, call.pieces) == ("f", "{}", "tool_calls", 3)
    assert call.others == ["g"]
