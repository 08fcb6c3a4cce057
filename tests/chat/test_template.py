"""Golden prompts of the GLM-4.7/GLM-5 grammar, and what normalise mends and refuses."""

import copy
import re

import pytest

from fourge.chat.template import MessageError, has_content, normalise, render
from fourge.errors import CheckpointError, DataError

HI = [{"role": "user", "content": "Hi"}]
CALL = {"name": "f", "arguments": '{"a": "x y", "n": 3, "o": {"k": [1]}}'}
# Two user turns, reasoning in both answers, one tool call, two tool results.
TOOL_LOOP = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1", "reasoning_content": "R1"},
    {"role": "user", "content": "U2"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "R2",
        "tool_calls": [{"id": "call_1", "type": "function", "function": CALL}],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "T1"},
    {"role": "tool", "tool_call_id": "call_1", "content": "T2"},
]
GET_TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Now",
        "parameters": {"type": "object", "properties": {}},
    },
}
LOOP_PROMPT = (
    "[gMASK]<sop><|system|>S<|user|>U1<|assistant|>{first}</think>A1<|user|>U2<|assistant|>"
    "<think>R2</think><tool_call>f<arg_key>a</arg_key><arg_value>x y</arg_value>"
    "<arg_key>n</arg_key><arg_value>3</arg_value><arg_key>o</arg_key>"
    '<arg_value>{{"k": [1]}}</arg_value></tool_call>'
    "<|observation|><tool_response>T1</tool_response><tool_response>T2</tool_response>"
)


def prompt(tokenizer, messages, tools=None, *, generate=True, **options):
    return render(
        tokenizer,
        normalise(messages),
        tools,
        add_generation_prompt=generate,
        options=options,
    )


def test_a_single_question_ends_in_an_open_think(tokenizer):
    assert prompt(tokenizer, HI) == "[gMASK]<sop><|user|>Hi<|assistant|><think>"


def test_thinking_off_ends_in_a_closed_think(tokenizer):
    text = prompt(tokenizer, HI, enable_thinking=False)
    assert text == "[gMASK]<sop><|user|>Hi<|assistant|></think>"


def test_tools_are_listed_as_json_before_the_first_message(tokenizer):
    assert prompt(tokenizer, HI, [GET_TIME]) == (
        "[gMASK]<sop><|system|>\n# Tools\n\nYou may call one or more functions to assist with the"
        " user query.\n\nYou are provided with function signatures within <tools></tools> XML"
        ' tags:\n<tools>\n{"type": "function", "function": {"name": "get_time", "description":'
        ' "Now", "parameters": {"type": "object", "properties": {}}}}\n</tools>\n\nFor each'
        " function call, output the function name and arguments within the following XML"
        " format:\n<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}"
        "</arg_value><arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>..."
        "</tool_call><|user|>Hi<|assistant|><think>"
    )


def test_two_tools_stand_on_a_line_each_and_keep_their_letters(tokenizer):
    other = {"type": "function", "function": {"name": "time_cn", "description": "\u65f6\u95f4 <b>"}}
    text = prompt(tokenizer, HI, [GET_TIME, other])
    assert '}}}}\n{"type": "function", "function": {"name": "time_cn", "description": "' in text
    assert '"\u65f6\u95f4 <b>"}}\n</tools>' in text


def test_earlier_reasoning_is_dropped_and_that_of_the_tool_loop_kept(tokenizer):
    expected = LOOP_PROMPT.format(first="") + "<|assistant|><think>"
    assert prompt(tokenizer, TOOL_LOOP) == expected


def test_clear_thinking_off_keeps_all_reasoning(tokenizer):
    expected = LOOP_PROMPT.format(first="<think>R1") + "<|assistant|><think>"
    assert prompt(tokenizer, TOOL_LOOP, clear_thinking=False) == expected


def test_thinking_off_still_keeps_the_reasoning_of_the_tool_loop(tokenizer):
    expected = LOOP_PROMPT.format(first="") + "<|assistant|></think>"
    assert prompt(tokenizer, TOOL_LOOP, enable_thinking=False) == expected


def test_without_generation_prompt_the_conversation_is_all(tokenizer):
    assert prompt(tokenizer, TOOL_LOOP, generate=False) == LOOP_PROMPT.format(first="")


def test_reasoning_inside_the_content_is_found(tokenizer):
    answer = {"role": "assistant", "content": "<think>\nR\n</think>\n\nA"}
    text = prompt(tokenizer, [*HI, answer], generate=False)
    assert text == "[gMASK]<sop><|user|>Hi<|assistant|><think>R</think>A"


def test_a_null_content_renders_nothing(tokenizer):
    text = prompt(tokenizer, [*HI, {"role": "assistant", "content": None}], generate=False)
    assert text == "[gMASK]<sop><|user|>Hi<|assistant|></think>"


def test_two_calls_without_arguments_follow_each_other(tokenizer):
    calls = [
        {"function": {"name": name, "arguments": text}} for name, text in (("f", ""), ("g", "{}"))
    ]
    answer = {"role": "assistant", "content": "ok ", "tool_calls": calls}
    text = prompt(tokenizer, [*HI, answer], generate=False)
    expected = "</think>ok<tool_call>f</tool_call><tool_call>g</tool_call>"
    assert text.removeprefix("[gMASK]<sop><|user|>Hi<|assistant|>") == expected


def test_each_output_of_a_tool_is_a_result_of_its_own(tokenizer):
    parts = [{"output": "T1"}, {"type": "text", "text": "T2"}, {"text": "+"}, {"output": "T3"}]
    messages = normalise([{"role": "tool", "tool_call_id": "c", "content": parts}])
    assert [message["content"] for message in messages] == ["T1", "T2+", "T3"]
    assert {message["tool_call_id"] for message in messages} == {"c"}
    text = render(tokenizer, messages)
    results = "".join(f"<tool_response>{part}</tool_response>" for part in ("T1", "T2+", "T3"))
    assert text == f"[gMASK]<sop><|observation|>{results}"


def test_a_reference_to_a_tool_shows_the_tool(tokenizer):
    function = GET_TIME["function"] | {"defer_loading": True, "strict": True}
    part = {"type": "tool_reference", "tool_name": "get_time"}
    messages = normalise([{"role": "tool", "content": [part]}], [{"function": function}])
    assert render(tokenizer, messages).endswith(
        '<|observation|><tool_response><tools>\n{"name": "get_time", "description": "Now",'
        ' "parameters": {"type": "object", "properties": {}}}\n</tools></tool_response>'
    )


def test_an_empty_list_is_an_empty_result(tokenizer):
    text = render(tokenizer, normalise([{"role": "tool", "content": []}]))
    assert text == "[gMASK]<sop><|observation|><tool_response></tool_response>"


def test_an_option_that_the_template_does_not_read_is_refused(tokenizer):
    for option in ("reasoning_effort", "chat_template", "tokenize", "messages", "tools", "enable"):
        with pytest.raises(MessageError, match=f"no option {option}: leave it out") as caught:
            render(tokenizer, normalise(HI), options={option: "x"})
        assert caught.value.kind == "unknown option"


def test_half_a_character_is_refused(tokenizer):
    with pytest.raises(MessageError, match="lone surrogate"):
        prompt(tokenizer, [{"role": "user", "content": "\ud83d"}])


def test_strings_are_rendered_raw_and_the_rest_as_json(tokenizer):
    arguments = {"s": '"q" {{ x }} \n </b>\u00e9', "n": None, "f": 1.5, "t": True, "l": ["\u00e9"]}
    answer = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}
    text = prompt(tokenizer, [*HI, answer], generate=False)
    pairs = re.findall(r"(?s)<arg_key>(.*?)</arg_key><arg_value>(.*?)</arg_value>", text)
    assert dict(pairs) == {
        "s": arguments["s"], "n": "null", "f": "1.5", "t": "true", "l": '["\u00e9"]'
    }  # fmt: skip


def test_results_apart_from_each_other_open_an_observation_each(tokenizer):
    result = {"role": "tool", "content": "T"}
    text = prompt(
        tokenizer, [result, {"role": "assistant", "content": "A"}, result], generate=False
    )
    block = "<|observation|><tool_response>T</tool_response>"
    assert text == f"[gMASK]<sop>{block}<|assistant|></think>A{block}"


def test_a_checkpoint_without_template_says_what_to_do(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(CheckpointError, match=r"no chat template .* use records of text"):
        render(bare, normalise(HI))


def test_a_malformed_template_is_the_checkpoints_fault(tokenizer):
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = "{% for m in messages %}"
    with pytest.raises(CheckpointError, match="malformed"):
        render(broken, normalise(HI))


def test_a_template_that_raises_refuses_the_messages(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(MessageError, match="roles must alternate") as caught:
        render(strict, normalise(HI))
    assert caught.value.kind == "refused by the template"


def test_normalise_leaves_its_input_alone():
    messages = copy.deepcopy(TOOL_LOOP)
    normalised = normalise(messages)
    normalised[4]["tool_calls"][0]["function"]["arguments"]["a"] = "changed"
    assert messages == TOOL_LOOP


def test_arguments_become_a_dict_in_their_order():
    call = normalise(TOOL_LOOP)[4]["tool_calls"][0]
    assert call["id"] == "call_1"
    assert list(call["function"]["arguments"].items()) == [
        ("a", "x y"),
        ("n", 3),
        ("o", {"k": [1]}),
    ]


def test_parts_of_text_are_joined():
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b\n"}, "c"]
    assert normalise([{"role": "user", "content": content}])[0]["content"] == "ab\nc"


@pytest.mark.parametrize(
    ("given", "role"), [("developer", "system"), ("function", "tool"), ("user", "user")]
)
def test_roles_get_the_names_that_templates_know(given, role):
    assert normalise([{"role": given, "content": "x"}])[0]["role"] == role


def test_thinking_blocks_are_reasoning():
    parts = [
        {"type": "thinking", "thinking": "R1", "signature": "s"},
        {"type": "text", "text": "A"},
        {"type": "thinking", "thinking": "R2"},
    ]
    message = normalise([{"role": "assistant", "content": parts}])[0]
    assert message == {"role": "assistant", "content": "A", "reasoning_content": "R1R2"}
    named = normalise([{"role": "assistant", "content": parts, "reasoning": "R"}])[0]
    assert named == {"role": "assistant", "content": "A", "reasoning_content": "R"}


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_reasoning_has_one_name(key):
    message = normalise([{"role": "assistant", "content": "A", key: "R"}])[0]
    assert message == {"role": "assistant", "content": "A", "reasoning_content": "R"}


def test_the_old_function_call_is_a_tool_call():
    message = normalise([{"role": "assistant", "content": None, "function_call": CALL}])[0]
    assert message["tool_calls"][0]["function"]["name"] == "f"
    assert message["tool_calls"][0]["function"]["arguments"]["n"] == 3
    assert "function_call" not in message


def test_an_empty_list_of_calls_is_no_list_of_calls():
    assert (
        "tool_calls" not in normalise([{"role": "assistant", "content": "A", "tool_calls": []}])[0]
    )


BAD = [
    ("not a list", "bad messages", "a string, needed a list"),
    ([], "empty", "is empty"),
    (["Hi"], "bad messages", "message 1 is a string"),
    ([{"role": "robot", "content": "x"}], "unknown role", 'message 1 has role "robot"'),
    ([{"content": "x"}], "unknown role", "message 1 has role null"),
    ([*HI, {"role": "user", "content": 3}], "bad content", "message 2 has a number"),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        "bad content",
        'a part of type "image_url"',
    ),
    ([{"role": "assistant", "tool_calls": {}}, {"role": "x"}], "unknown role", "message 2"),
    ([{"role": "assistant", "tool_calls": "f"}], "bad tool calls", "a string, not a list"),
    ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "bad tool calls", "no function"),
    (
        [*HI, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        "bad tool arguments",
        "message 2 calls f with arguments that are not JSON",
    ),
    (
        [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": NaN}'}]}],
        "bad tool arguments",
        "message 1 calls f with arguments that are not JSON (NaN is no JSON)",
    ),
    (
        [{"role": "tool", "content": [{"type": "tool_reference", "tool_name": "f"}]}],
        "bad content",
        'message 1 refers to the tool "f", which is not among the tools',
    ),
    (
        [{"role": "tool", "content": [{"output": "T"}, {"type": "image"}]}],
        "bad content",
        'message 1 has a part of type "image"',
    ),
    (
        [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}],
        "bad tool arguments",
        "message 1 calls f with a list as arguments, needed an object",
    ),
]


@pytest.mark.parametrize(("messages", "kind", "words"), BAD)
def test_unusable_messages_are_refused_by_place_and_kind(messages, kind, words):
    with pytest.raises(DataError) as caught:
        normalise(messages)
    assert isinstance(caught.value, MessageError)
    assert caught.value.kind == kind
    assert words in str(caught.value)


def test_a_call_counts_as_content_and_blanks_do_not():
    assert has_content(normalise([{"role": "assistant", "tool_calls": [{"function": CALL}]}]))
    assert not has_content(normalise([{"role": "user", "content": " \n"}]))
