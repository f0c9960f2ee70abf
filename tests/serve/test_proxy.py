"""`molora route` before a real server of a tiny model: what it chooses, for whom, and that answers stay the same.

Texts are compared with what transformers and PEFT generate, so neither server is the measure of the other.
"""

import httpx
import openai
import pytest

from tests.serve.routed import ODD, make_selector, routing
from tests.serve.served import KEYS, WORDS, bearer, listening, make_world, options_of, started, text_of, until

PROMPT = {name: words[0] for name, words in WORDS.items()}
LIMIT = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    make_selector(folder / "selector")
    return folder


@pytest.fixture(scope="module")
def upstream(world):
    with started(options_of(world)) as service, listening(service) as url:
        yield url


@pytest.fixture(scope="module")
def router(world, upstream):
    with routing(upstream, selector=str(world / "selector")) as (url, _):
        yield url


@pytest.fixture(scope="module")
def guarded(world, upstream, tmp_path_factory):
    """A router with tenants."""
    folder = tmp_path_factory.mktemp("tenants")
    with pytest.MonkeyPatch.context() as patch:
        for name, key in KEYS.items():
            patch.setenv(f"KEY_{name.upper()}", key)
        options = {"tenants": str(world / "tenants.yaml"), "database": str(folder / "tenants.db"), "base": "base"}
        with routing(upstream, selector=str(world / "selector"), feedback=str(folder / "log"), **options) as found:
            yield found


def client_of(url, key="none"):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def complete(url, model, prompt, key="none", **more):
    client = client_of(url, key)
    return client.completions.create(model=model, prompt=prompt, max_tokens=LIMIT, temperature=0, **more)


# --- choosing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORDS)
def test_auto_is_the_adapter_that_fits(name, router, world):
    answer = complete(router, "auto", PROMPT[name])
    assert answer.choices[0].text == text_of(PROMPT[name], LIMIT, world / f"lora-{name}")
    assert answer.model == name
    assert answer.molora["adapters"] == {name: 1.0}
    assert not answer.molora["abstained"]
    assert f"'{name}'" in answer.molora["why"]
    assert set(answer.molora["scores"]) == set(WORDS)


def test_an_unlike_prompt_is_for_the_base(router):
    answer = complete(router, "auto", ODD)
    assert answer.choices[0].text == text_of(ODD, LIMIT)
    assert answer.model == "base"
    assert answer.molora["base"] is True
    assert answer.molora["abstained"] is True
    assert "base model answers" in answer.molora["why"]


def test_the_answers_differ_at_all(world):
    texts = {text_of(PROMPT["ann-law"], LIMIT, world / f"lora-{name}") for name in WORDS}
    assert len({*texts, text_of(PROMPT["ann-law"], LIMIT)}) == len(WORDS) + 1


@pytest.mark.parametrize("model", ["base", "bob-plans", "mix"])
def test_other_names_pass_through(model, router, upstream):
    mine, theirs = (complete(url, model, PROMPT["shared"]) for url in (router, upstream))
    assert mine.choices[0].text == theirs.choices[0].text
    assert mine.molora == theirs.molora
    assert mine.usage == theirs.usage


def test_a_chat_is_chosen_by_what_users_say(router, upstream):
    messages = [
        {"role": "system", "content": PROMPT["bob-plans"]},
        {"role": "user", "content": [{"type": "text", "text": PROMPT["ann-news"]}]},
    ]
    options = {"messages": messages, "max_tokens": LIMIT, "temperature": 0}
    mine = client_of(router).chat.completions.create(model="auto", **options)
    theirs = client_of(upstream).chat.completions.create(model="ann-news", **options)
    assert mine.choices[0].message.content == theirs.choices[0].message.content
    assert mine.molora["adapters"] == {"ann-news": 1.0}


def test_a_stream_is_the_same_text_and_tells_at_its_end(router, world):
    client = client_of(router)
    raw = client.completions.with_raw_response.create(
        model="auto", prompt=PROMPT["bob-secret"], max_tokens=LIMIT, temperature=0, stream=True
    )
    assert raw.headers["x-molora-model"] == "bob-secret"
    assert raw.headers["x-molora-abstained"] == "false"
    assert "fits best" in raw.headers["x-molora-why"]
    chunks = list(raw.parse())
    assert "".join(one.choices[0].text for one in chunks) == text_of(PROMPT["bob-secret"], LIMIT,
                                                                     world / "lora-bob-secret")  # fmt: skip
    assert len(chunks) > 1
    assert [hasattr(one, "molora") for one in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].molora["adapters"] == {"bob-secret": 1.0}
    assert chunks[-1].molora["response_id"] == raw.headers["x-molora-response-id"]


def test_embeddings_are_those_of_the_chosen_adapter(router, upstream):
    options = {"input": [PROMPT["shared"]], "encoding_format": "float"}
    mine = client_of(router).embeddings.create(model="auto", **options)
    theirs = client_of(upstream).embeddings.create(model="shared", **options)
    other = client_of(upstream).embeddings.create(model="base", **options)
    assert mine.data[0].embedding == theirs.data[0].embedding != other.data[0].embedding


def test_what_auto_cannot_read_is_refused(router):
    for prompt in ([5, 6, 7], [PROMPT["shared"], PROMPT["ann-law"]]):
        with pytest.raises(openai.BadRequestError, match="'auto'"):
            complete(router, "auto", prompt)


def test_models_are_the_upstream_servers_and_auto(router, upstream):
    mine, theirs = ({one.id for one in client_of(url).models.list()} for url in (router, upstream))
    assert mine == theirs | {"auto"}
    assert client_of(router).models.retrieve("auto").owned_by == "molora"
    with pytest.raises(openai.NotFoundError):
        client_of(router).models.retrieve("nothing")


def test_unknown_names_answer_404(router):
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        complete(router, "nothing", "a film")
    assert caught.value.code == "model_not_found"


def test_it_says_that_it_is_ready_and_counts(router):
    assert httpx.get(f"{router}/healthz").json() == {"healthy": True}
    assert httpx.get(f"{router}/readyz").json() == {"ready": True, "upstream": "ok"}
    before = httpx.get(f"{router}/metrics").text
    complete(router, "auto", PROMPT["shared"])
    after = httpx.get(f"{router}/metrics").text
    line = 'molora_route_choices_total{adapter="shared"} '

    def count(text):
        return sum(float(one.removeprefix(line)) for one in text.splitlines() if one.startswith(line))

    assert count(after) == count(before) + 1


# --- tenants ----------------------------------------------------------------------------------------------------------


def test_a_key_is_needed(guarded):
    url, _ = guarded
    for key in ("wrong", "x" * 40):
        with pytest.raises(openai.AuthenticationError):
            complete(url, "base", "a film", key)
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/metrics").status_code == 401
    assert httpx.get(f"{url}/metrics", headers=bearer("admin")).status_code == 200


def test_forbidden_is_answered_like_unknown(guarded):
    url, _ = guarded
    answers = []
    for name in ("bob-secret", "bob-nothing"):
        found = httpx.post(
            f"{url}/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 2}, headers=bearer("ann")
        )
        answers.append((found.status_code, found.text.replace(name, "NAME")))
    assert answers[0] == answers[1]
    assert answers[0][0] == 404
    assert {one.id for one in client_of(url, KEYS["ann"]).models.list()} == {
        "base", "ann-law", "ann-news", "shared", "mix", "auto"
    }  # fmt: skip
    assert {one.id for one in client_of(url, KEYS["noone"]).models.list()} == {"shared", "auto"}


def test_auto_sees_only_what_the_caller_may_use(guarded):
    url, _ = guarded
    answer = complete(url, "auto", PROMPT["bob-secret"], KEYS["ann"])
    told = answer.model_dump_json()
    assert "bob" not in told
    assert set(answer.molora["scores"]) == {"ann-law", "ann-news", "shared"}
    assert complete(url, "auto", PROMPT["bob-secret"], KEYS["bob"]).molora["scores"].keys() == {
        "bob-secret", "bob-plans", "shared"
    }  # fmt: skip


def test_without_a_right_to_the_base_nothing_is_chosen(guarded):
    url, _ = guarded
    with pytest.raises(openai.NotFoundError) as caught:
        complete(url, "base", "a film", KEYS["noone"])
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    "more",
    [
        {"molora": {"adapters": {"bob-secret": 1.0}}},
        {"molora": {"selector": "x"}},
        {"lora_path": "bob-secret"},
        {"adapter_id": "bob-secret"},
        {"adapter_source": "local"},
        {"kv_transfer_params": {"remote_host": "127.0.0.1"}},
        {"priority": -1},
    ],
)
def test_no_other_field_names_an_adapter(more, guarded):
    url, _ = guarded
    with pytest.raises(openai.BadRequestError, match="by model alone"):
        complete(url, "base", "a film", KEYS["ann"], extra_body=more)


@pytest.mark.parametrize("name", ["base:bob-secret", "ann-law/../bob-secret", "ann-//x", "ann-x/", "bob-secret@1"])
def test_no_spelling_leads_to_another_adapter(name, guarded):
    url, _ = guarded
    with pytest.raises(openai.NotFoundError):
        complete(url, name, "a film", KEYS["ann"])


def test_usage_is_what_the_upstream_server_counted(guarded):
    url, proxy = guarded

    def used():
        rows = [row for row in proxy.tenants.usage("bob") if row.program == "bob-plans"]
        return sum(row.input_tokens for row in rows), sum(row.output_tokens for row in rows), len(rows)

    before = used()
    answer = complete(url, "bob-plans", PROMPT["bob-plans"], KEYS["bob"])
    wanted = before[0] + answer.usage.prompt_tokens, before[1] + answer.usage.completion_tokens
    until(lambda: used()[:2] == wanted)
    with client_of(url, KEYS["bob"]) as client:
        chunks = list(
            client.completions.create(
                model="bob-plans", prompt=PROMPT["bob-plans"], max_tokens=LIMIT, temperature=0, stream=True
            )
        )
    assert all(one.choices and one.usage is None for one in chunks)  # it had not asked for usage
    wanted = wanted[0] + answer.usage.prompt_tokens, wanted[1] + answer.usage.completion_tokens
    until(lambda: used()[:2] == wanted)
    assert proxy.tenants.quotas.running().get("bob", 0) == 0


def test_a_limit_answers_429(guarded):
    url, _ = guarded
    for _ in range(2):
        complete(url, "shared", "a film", KEYS["plain"])
    with pytest.raises(openai.RateLimitError) as caught:
        complete(url, "shared", "a film", KEYS["plain"])
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_feedback_reaches_the_bandit_of_the_caller(guarded):
    url, proxy = guarded
    answer = complete(url, "auto", PROMPT["ann-law"], KEYS["ann"])
    assert sum(answer.molora["bandit"]["probabilities"].values()) == pytest.approx(1.0)

    def give(name, id, reward=1.0):
        told = {"response_id": id, "reward": reward}
        return httpx.post(f"{url}/v1/feedback", json=told, headers=bearer(name))

    assert give("bob", answer.id).status_code == 404  # not his
    assert give("ann", answer.id, 2.0).status_code == 400
    assert give("ann", answer.id).status_code == 200  # by the id that clients know
    assert give("ann", answer.molora["response_id"]).status_code == 404  # once
    (event,) = [e for e in proxy.feedback._of("ann").bandit.log if e["event"] == "reward"]
    assert event["reward"] == 1.0
    assert event["id"] == answer.molora["response_id"].rpartition("-")[2]


def test_without_bandits_there_is_no_feedback(router):
    found = httpx.post(f"{router}/v1/feedback", json={"response_id": "x", "reward": 1})
    assert (found.status_code, found.json()["error"]["code"]) == (404, "feedback_off")
