"""The server against requests made from its own OpenAPI description: never a 5xx, always JSON."""

from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from fourge.serve.app import create_routes
from fourge.serve.limits import Limits
from fourge.serve.service import Service
from scripted_engine import scripted
from serving import running

DESCRIPTION = create_routes(Service(Limits())).openapi()
schema = schemathesis.openapi.from_dict(DESCRIPTION)


@pytest.fixture(scope="module")
def url(tiny_glm: Path):
    served, _ = scripted(tiny_glm, "I think.</think>Hello.<tool_call>f</tool_call>", stride=4)
    with running(served) as found:
        yield found.url


@schema.parametrize()
@settings(
    max_examples=12, deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_no_request_makes_the_server_fail(case: schemathesis.Case, url: str):
    # Almost no generated name is that of the model, and 404 would hide what comes after it.
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "tiny-glm"
    answer = case.call(base_url=url, timeout=30)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]


def test_every_route_is_described():
    assert {
        "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/messages",
        "/v1/messages/count_tokens", "/v1/responses", "/tokenize", "/detokenize",
        "/health", "/ready", "/version",
        "/server_info", "/metrics",
    } <= DESCRIPTION["paths"].keys()  # fmt: skip
