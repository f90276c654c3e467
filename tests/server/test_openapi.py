"""The served OpenAPI document against the server: schemathesis makes requests from it and checks the answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.running import RunningServer
from tests.server.test_wire import NEEDED

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis needs Python 3.11")

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi import checks as openapi_checks  # noqa: E402

CHECKS = [
    not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]
LENGTHS = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
}


@pytest.fixture(scope="module")
def document(server: RunningServer) -> Iterator[Any]:
    yield schemathesis.openapi.from_url(server.base + "/openapi.json")


def short(case: Any) -> None:
    """Answers of a few tokens: how long they are is not what is asked here."""
    for name in LENGTHS.get(case.operation.path, ()) if isinstance(case.body, dict) else ():
        length = case.body.get(name)
        if length is None or (isinstance(length, int) and length > 3):
            case.body[name] = 3


def usable(case: Any, path: str) -> None:
    """Random messages are refused at once; with good ones, the other fields are read too, each as it was made."""
    case.body = {name: value for name, value in case.body.items() if name not in ("model", "messages", "input", "prompt")}
    case.body |= NEEDED[path]


def run(operation: Any, mode: str, number: int, path: str | None = None) -> Counter[int]:
    """The statuses of `number` requests, each checked against the document."""
    statuses: Counter[int] = Counter()

    @seed(1)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def ask(case: Any) -> None:
        if path is not None:
            usable(case, path)
        short(case)
        response = case.call(timeout=120)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    ask()
    return statuses


def test_reading_routes(document: Any) -> None:
    paths = [path for path, methods in document.raw_schema["paths"].items() if "get" in methods]
    assert len(paths) == 8
    for path in paths:
        statuses = run(document[path]["GET"], "positive", 10)
        assert set(statuses) <= {200, 400, 404} and (200 in statuses or "{" in path), path


@pytest.mark.parametrize("path", NEEDED)
def test_bodies_made_from_the_document(document: Any, path: str) -> None:
    operation = document[path]["POST"]
    assert set(run(operation, "positive", 40)) <= {200, 400, 404}
    assert 200 in run(operation, "positive", 40, path), "some were good, as the test must see answers too"
    assert set(run(operation, "negative", 40)) <= {200, 400, 404}


def test_the_checks_notice_what_is_not_declared(server: RunningServer) -> None:
    import requests

    wrong = requests.get(server.base + "/openapi.json", timeout=60).json()
    del wrong["paths"]["/v1/models/{model}"]["get"]["responses"]["404"]
    schema = schemathesis.openapi.from_dict(wrong)
    schema.config.update(base_url=server.base)
    with pytest.raises(schemathesis.core.failures.FailureGroup, match="404"):
        run(schema["/v1/models/{model}"]["GET"], "positive", 3)
