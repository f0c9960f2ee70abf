"""schemathesis against /openapi.json: whatever the description allows is answered as it says, and never with a 500."""

import json
import re

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from molora.serve.http import create_app
from tests.serve.served import bearer, started, with_tenants

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
SELECTORS = {"topic": {"method": "centroid", "embedder": "words", "guard": "nearest"}}


@pytest.fixture(scope="module")
def app(world, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        options = with_tenants(world, tmp_path_factory.mktemp("schema"), patch, selectors=SELECTORS, feedback=True)
        with started(options) as service:
            yield create_app(service, close=False)


@pytest.fixture(scope="module")
def described(app):
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_every_answer_is_as_described(described):
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    bounded = settings(max_examples=25, deadline=None, suppress_health_check=quiet, derandomize=True, database=None,
                       phases=[Phase.explicit, Phase.generate])  # fmt: skip
    seen = set()
    for found in described.get_all_operations():
        operation = found.ok()

        @bounded
        @given(case=operation.as_strategy())
        def check(case):
            for who in ("ann", "admin"):
                case.call_and_validate(headers=bearer(who), checks=CHECKS)

        check()
        seen.add(operation.label)
    assert {"POST /v1/chat/completions", "DELETE /v1/adapters/{name}", "GET /metrics"} <= seen


ANSWERED = [  # random bodies rarely name a model; these are answered
    ("post", "/v1/completions", {"model": "ann-law", "prompt": "a film", "max_tokens": 3, "logprobs": 2, "n": 2}),
    ("post", "/v1/completions", {"model": "mix", "prompt": "a", "max_tokens": 2, "molora": {"trace": True}}),
    ("post", "/v1/completions", {"model": "auto", "prompt": "the team is not the goal", "max_tokens": 2}),
    ("post", "/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2,
                                      "logprobs": True, "top_logprobs": 1}),
    ("post", "/v1/embeddings", {"model": "shared", "input": ["a", "b"]}),
    ("post", "/v1/embeddings", {"model": "auto", "input": "a", "encoding_format": "base64"}),
    ("get", "/v1/models", None),
    ("get", "/v1/models/ann-law", None),
    ("get", "/v1/adapters", None),
    ("get", "/v1/adapters/mix", None),
    ("patch", "/v1/adapters/shared", {"pinned": False}),
    ("post", "/v1/adapters", {"name": "ann-law"}),
    ("post", "/v1/load_lora_adapter", {"lora_name": "ann-copy", "lora_path": "ann-news"}),
    ("post", "/v1/unload_lora_adapter", {"lora_name": "ann-copy"}),
    ("get", "/v1/tenants/ann/routing", None),
    ("get", "/healthz", None),
    ("get", "/readyz", None),
]  # fmt: skip


@pytest.mark.parametrize("method, path, body", ANSWERED, ids=lambda value: value if isinstance(value, str) else "")
def test_answers_that_succeed_are_as_described(app, method, path, body):
    """The answer beside the description, checked by jsonschema alone."""
    import jsonschema

    client = TestClient(app)
    options = {} if body is None else {"json": body}
    answer = getattr(client, method)(path, headers=bearer("ann"), **options)
    assert answer.status_code == 200, answer.text
    told = client.get("/openapi.json").json()
    patterns = (path, re.sub("(ann-law|mix|shared)$", "{name}", path), path.replace("/ann/", "/{name}/"))
    route = next(one for one in patterns if one in told["paths"])
    content = told["paths"][route][method]["responses"]["200"]["content"]
    kind = answer.headers["content-type"].partition(";")[0]
    assert kind in content
    if kind == "application/json":
        schema_ = {**content[kind]["schema"], "components": told["components"]}
        jsonschema.validate(answer.json(), schema_)


def test_the_description_names_the_errors(app):
    told = TestClient(app).get("/openapi.json").json()
    text = json.dumps(told)
    assert "HTTPValidationError" not in text and "422" not in text
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
        responses = told["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "403", "404", "413", "429", "503"} <= set(responses)
        assert responses["429"]["content"]["application/json"]["schema"]["$ref"].endswith("/Error")


def test_there_is_no_description_when_it_is_turned_off(app):
    hidden = TestClient(create_app(app.state.service, close=False, docs=False))
    assert hidden.get("/openapi.json").status_code == 404
