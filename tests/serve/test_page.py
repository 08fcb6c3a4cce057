"""The chat page in a real browser: what it sends, what it shows, and that it needs nobody else."""

import re
from pathlib import Path

import httpx2

from browser import needs_browser
from browser_session import Page, opened
from fourge.serve.chat_page import PAGE
from scripted_engine import scripted
from serving import Running, running

SPEECH = "I think <b>hard</b>.</think>Let me see: 1 < 2."
CALL = (
    "</think><tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>"
)
TOOL = '[{"type": "function", "function": {"name": "get_weather"}}]'


def send(page: Page, text: str, turns: int) -> None:
    page.run(f"document.getElementById('question').value = {text!r}")
    page.run("document.getElementById('ask').requestSubmit()")
    answered(page, turns)


def answered(page: Page, turns: int) -> None:
    page.wait(f"document.querySelectorAll('.figures').length === {turns}")


def text_of(page: Page, selector: str) -> list[str]:
    return page.run(f"[...document.querySelectorAll('{selector}')].map(one => one.textContent)")


@needs_browser
def test_a_conversation_with_reasoning_and_a_tool(tiny_glm: Path, tmp_path: Path):
    served, engine = scripted(tiny_glm, SPEECH, CALL, "</think>It is sunny.")
    with running(served, api_keys=("key",)) as found, opened(found.url, tmp_path / "p") as page:
        page.wait("document.getElementById('key') !== null")
        page.run("document.getElementById('key').value = 'key'")
        page.run("document.getElementById('key').dispatchEvent(new Event('change'))")
        page.wait("document.querySelectorAll('#model option').length === 2")
        send(page, "Hi <i>there</i>", 1)
        assert text_of(page, ".user") == ["Hi <i>there</i>"]
        assert text_of(page, ".content") == ["Let me see: 1 < 2."]
        assert text_of(page, ".reasoning") == ["I think <b>hard</b>."]
        assert page.run("document.querySelector('details').open") is False  # folded
        assert re.match(r"stop · \d+ tokens · [\d.]+ tokens/s$", text_of(page, ".figures")[0])

        page.run(f"document.getElementById('tools').value = {TOOL!r}")
        send(page, "Weather?", 2)
        assert text_of(page, ".call") == ['get_weather {"city": "Paris"}']
        page.run("document.querySelector('form input').value = 'sunny'")
        page.run("document.querySelector('.turn form').requestSubmit()")
        answered(page, 3)
        assert text_of(page, ".content")[-1] == "It is sunny."
        page.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000
    prompt = str(served.tokenizer.decode(engine.prompts[-1]))
    assert prompt.endswith(
        CALL + "<|observation|><tool_response>sunny</tool_response><|assistant|><think>"
    )


@needs_browser
def test_a_refusal_is_shown_and_an_answer_can_be_stopped(tiny_glm: Path, tmp_path: Path):
    served, engine = scripted(tiny_glm, "</think>" + "a " * 900, pause_s=0.02)
    with running(served) as found, opened(found.url, tmp_path / "p") as page:
        page.wait("document.querySelectorAll('#model option').length === 2")
        page.run("document.getElementById('tools').value = '[{}]'")
        send(page, "Hi", 1)
        assert "tools.0" in text_of(page, ".error")[0]
        page.run("document.getElementById('tools').value = ''")
        page.run("document.getElementById('question').value = 'Again'")
        page.run("document.getElementById('ask').requestSubmit()")
        page.wait("document.querySelector('.content')?.textContent.length > 4")
        page.run("document.getElementById('ask').requestSubmit()")  # the button says Stop
        answered(page, 2)
        page.wait("document.getElementById('send').textContent === 'Send'")
        assert text_of(page, ".figures")[1] == "stopped"
        page.run("document.getElementById('reset').click()")
        assert text_of(page, ".turn") == []
    assert engine.under_way == 0


@needs_browser
def test_a_real_engine_shows_its_acceptance(server: Running, tmp_path: Path):
    with opened(server.url, tmp_path / "p") as page:
        page.wait("document.querySelectorAll('#model option').length === 2")
        page.run("document.getElementById('think').checked = false")
        page.run("void (window.fetch = (old => (url, how) => old(url, how && how.body ? {...how,"
                 " body: how.body.replace('{', '{\"max_tokens\": 40, \"ignore_eos\": true, ')} :"
                 " how))(window.fetch))")  # fmt: skip
        send(page, "Write a line.", 1)
        (figures,) = text_of(page, ".figures")
    assert re.match(
        r"length · 40 tokens · [\d.]+ tokens/s · acceptance \d+ % · [\d.]+ tokens a step$", figures
    )


def test_the_page_needs_nothing_from_elsewhere(tiny_glm: Path):
    served, _ = scripted(tiny_glm, "x")
    with running(served) as found:
        answer = httpx2.get(found.url)
    assert answer.text == PAGE.read_text()
    assert answer.headers["content-type"].startswith("text/html")
    assert re.findall(r"(?:src|href)=\"(?!data:)", answer.text) == []
    assert "http" not in answer.text
