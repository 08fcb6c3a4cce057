"""Serve a checkpoint, talk to it with OpenAI's client, and stop the server: the end of `make demo`.

.venv/bin/python examples/talk.py out/tiny-glm-NVFP4
"""

import signal
import subprocess
import sys

import openai

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


def main(checkpoint: str) -> int:
    command = [sys.executable, "-m", "fourge.cli.main", "serve", checkpoint, "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    url = ""
    for line in server.stderr:
        print(line, end="", file=sys.stderr)
        if line.startswith("serving "):
            url = line.split()[-1]
            break
    if url:
        talk(openai.OpenAI(base_url=f"{url}/v1", api_key="none"))
        server.send_signal(signal.SIGTERM)
    log = server.stderr.read()
    print(log, end="", file=sys.stderr)
    return server.wait()


def talk(client: openai.OpenAI) -> None:
    """One streamed answer, one tool call."""
    model = client.models.list().data[0].id
    direct = {"chat_template_kwargs": {"enable_thinking": False}}
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "How are you?"}], max_tokens=48,
        stream=True, extra_body=direct,
    )  # fmt: skip
    print("streamed: ", end="")
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Is it raining in Paris?"}],
        tools=[TOOL], tool_choice="required", max_tokens=200, extra_body=direct,
    )  # type: ignore[call-overload]  # fmt: skip
    for call in answer.choices[0].message.tool_calls:
        print(f"tool call: {call.function.name} {call.function.arguments}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
