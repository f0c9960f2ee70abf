"""The official `openai` client, unchanged, against a real server on a socket."""

import base64
import struct

import httpx
import openai
import pytest
import torch

from molora.serve.engine.programs import Decision
from molora.serve.http.tracing import LONGEST, Tracer
from molora.serve.request import Base, Mixture, Request, Sampling, Token, Weighted
from tests import tiny
from tests.serve.served import ADAPTERS, KEYS, listening, options_of, started, text_of, with_tenants

PROMPT = "the doctor is not the patient"
GREEDY = {"temperature": 0, "max_tokens": 8}
SELECTORS = {"topic": {"method": "centroid", "embedder": "words", "guard": None}}


@pytest.fixture(scope="module")
def service(world):
    with started(options_of(world, selectors=SELECTORS)) as found:
        yield found


@pytest.fixture(scope="module")
def url(service):
    with listening(service) as found:
        yield found


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as found:
        yield found


def engine_text(service, program, prompt=PROMPT, **sampling):
    ids = service.tokenizer(prompt).input_ids
    return service.engine.submit(Request(ids, program, Sampling(temperature=0, max_tokens=8, **sampling))).result()[0]


def test_models_are_listed_and_found(client):
    assert {one.id for one in client.models.list()} == {"base", "auto", "mix", *ADAPTERS}
    assert client.models.retrieve("ann-law").parent == "base"
    assert client.models.retrieve("base").parent is None
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("nobody")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize("name", ["base", "ann-law", "bob-secret"])
def test_answers_are_those_of_transformers_and_peft(client, world, name):
    lora = None if name == "base" else world / f"lora-{name}"
    answer = client.completions.create(model=name, prompt=PROMPT, **GREEDY)
    assert answer.choices[0].text.split() == text_of(PROMPT, 8, lora).split()
    assert answer.choices[0].text and answer.object == "text_completion" and answer.model == name


def test_adapters_answer_differently(client):
    texts = {client.completions.create(model=name, prompt=PROMPT, **GREEDY).choices[0].text for name in ADAPTERS}
    assert len(texts) > 2


@pytest.mark.parametrize(
    "model, extra, program",
    [
        ("base", None, Base()),
        ("ann-law", None, Weighted((("ann-law", 1.0),))),
        ("base", {"adapters": {"ann-law": 0.4, "bob-plans": 0.6}}, Weighted((("ann-law", 0.4), ("bob-plans", 0.6)))),
        ("mix", None, Mixture("mix")),
    ],
)
def test_every_program_equals_the_engine(client, service, model, extra, program):
    body = None if extra is None else {"molora": extra}
    answer = client.completions.create(model=model, prompt=PROMPT, extra_body=body, **GREEDY)
    assert answer.choices[0].text == engine_text(service, program)
    told = answer.model_extra["molora"]
    if isinstance(program, Base):
        assert told == {"base": True}
    elif isinstance(program, Mixture):
        assert told == {"mixture": "mix"}
    else:
        assert told == {"adapters": dict(program.weights)}


def test_chat_is_its_messages_line_by_line_without_a_template(client, service):
    messages = [{"role": "system", "content": "yes"}, {"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    answer = client.chat.completions.create(model="ann-news", messages=messages, **GREEDY)
    prompt = f"system: yes\nuser: {PROMPT}\nassistant:"
    choice = answer.choices[0]
    assert choice.message.content == engine_text(service, Weighted((("ann-news", 1.0),)), prompt)
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == len(service.tokenizer(prompt).input_ids)
    assert answer.usage.completion_tokens == 8 and answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_streams_add_up_to_the_whole_answer(client):
    messages = [{"role": "user", "content": PROMPT}]
    whole = client.chat.completions.create(model="mix", messages=messages, **GREEDY)
    parts = list(client.chat.completions.create(
        model="mix", messages=messages, stream=True, stream_options={"include_usage": True}, **GREEDY
    ))  # fmt: skip
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert [p.choices[0].finish_reason for p in parts if p.choices and p.choices[0].finish_reason] == ["length"]
    assert parts[-1].choices == [] and parts[-1].usage.completion_tokens == 8
    assert len({part.id for part in parts}) == 1 and len(parts) > 5  # not all at once
    end = next(part for part in parts if part.choices and part.choices[0].finish_reason)
    assert end.model_extra["molora"] == {"mixture": "mix"}

    parts = list(client.completions.create(model="mix", prompt=PROMPT, stream=True, **GREEDY))
    whole = client.completions.create(model="mix", prompt=PROMPT, **GREEDY)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert all(part.usage is None for part in parts)


def test_async_streams_interleave(url):
    import asyncio

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

            async def one(model):
                stream = await client.completions.create(model=model, prompt=PROMPT, stream=True, **GREEDY)
                return "".join([part.choices[0].text async for part in stream])

            return await asyncio.gather(*(one(name) for name in ADAPTERS))

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        alone = [client.completions.create(model=n, prompt=PROMPT, **GREEDY).choices[0].text for n in ADAPTERS]
    assert asyncio.run(ask()) == alone


def test_several_choices_and_prompts(client):
    answer = client.completions.create(model="base", prompt=[PROMPT, "a film"], n=2, max_tokens=6, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text != answer.choices[1].text  # seeds of choices differ
    assert answer.usage.prompt_tokens == 7 + 3  # each prompt is read once, with its begin token
    assert answer.usage.completion_tokens == 24
    again = client.completions.create(model="base", prompt=[PROMPT, "a film"], n=2, max_tokens=6, seed=5)
    assert [one.text for one in again.choices] == [one.text for one in answer.choices]
    other = client.completions.create(model="base", prompt=[PROMPT, "a film"], n=2, max_tokens=6, seed=6)
    assert [one.text for one in other.choices] != [one.text for one in answer.choices]
    parts = list(client.completions.create(model="base", prompt=[PROMPT, "a film"], n=2, max_tokens=6, seed=5,
                                           stream=True))  # fmt: skip
    streamed = ["".join(p.choices[0].text for p in parts if p.choices[0].index == i) for i in range(4)]
    assert streamed == [one.text for one in answer.choices]


def test_prompts_may_be_tokens(client, service):
    ids = service.tokenizer(PROMPT).input_ids
    text = client.completions.create(model="ann-law", prompt=PROMPT, **GREEDY).choices[0].text
    assert client.completions.create(model="ann-law", prompt=ids, **GREEDY).choices[0].text == text
    assert client.completions.create(model="ann-law", prompt=[ids, ids], **GREEDY).choices[1].text == text


def test_logprobs_are_those_of_the_model(client, service):
    answer = client.completions.create(model="base", prompt=PROMPT, logprobs=3, **GREEDY).choices[0]
    told = answer.logprobs
    ids = torch.tensor([service.tokenizer(PROMPT).input_ids])
    with torch.no_grad():
        expected = tiny.tiny_llama()(input_ids=ids).logits[0, -1].log_softmax(-1).topk(3)
    assert list(told.top_logprobs[0].values()) == pytest.approx(expected.values.tolist(), abs=1e-4)
    assert list(told.top_logprobs[0]) == [service.tokenizer.decode([one]) for one in expected.indices.tolist()]
    assert told.token_logprobs[0] == pytest.approx(expected.values[0].item(), abs=1e-4)
    for token, at in zip(told.tokens, told.text_offset, strict=True):
        assert answer.text[at:].startswith(token)
    messages = [{"role": "user", "content": PROMPT}]
    content = client.chat.completions.create(
        model="base", messages=messages, logprobs=True, top_logprobs=2, **GREEDY
    ).choices[0].logprobs.content  # fmt: skip
    assert len(content) == 8 and all(len(one.top_logprobs) == 2 for one in content)
    assert all(one.top_logprobs[0].logprob == pytest.approx(one.logprob) for one in content)
    assert all(bytes(one.bytes).decode() == one.token for one in content)


def test_stop_strings_end_answers(client):
    whole = client.completions.create(model="base", prompt=PROMPT, **GREEDY).choices[0].text
    word = whole.split()[3]
    assert word not in whole.split()[:3]
    answer = client.completions.create(model="base", prompt=PROMPT, stop=[word], **GREEDY)
    assert answer.choices[0].text == whole[: whole.index(word)] and answer.choices[0].finish_reason == "stop"
    parts = client.completions.create(model="base", prompt=PROMPT, stop=word, stream=True, **GREEDY)
    assert "".join(part.choices[0].text for part in parts) == whole[: whole.index(word)]


def test_sampling_options_reach_the_engine(client, service):
    token = service.tokenizer("planet").input_ids[-1]
    answer = client.completions.create(model="base", prompt=PROMPT, logit_bias={str(token): 100}, **GREEDY)
    assert answer.choices[0].text.split() == ["planet"] * 8
    extra = {"top_k": 1, "repetition_penalty": 1.3, "min_tokens": 3, "stop_token_ids": [token], "ignore_eos": True}
    answer = client.completions.create(model="base", prompt=PROMPT, temperature=1, max_tokens=8, extra_body=extra)
    expected = engine_text(
        service, Base(), repetition_penalty=1.3, min_tokens=3, stop_token_ids=(token,), ignore_eos=True
    )
    assert answer.choices[0].text == expected  # top_k 1 is greedy


def test_embeddings_are_the_engines(client, service):
    texts = [PROMPT, "a film"]
    tokens = [service.tokenizer(text).input_ids for text in texts]
    for name, program in (("base", Base()), ("ann-law", Weighted((("ann-law", 1.0),)))):
        expected = service.engine.embed(tokens, program).values
        answer = client.embeddings.create(model=name, input=texts)  # the client asks for base64
        floats = client.embeddings.create(model=name, input=texts, encoding_format="float")
        for one in (answer, floats):
            assert torch.allclose(torch.tensor([each.embedding for each in one.data]), expected, atol=1e-6)
        assert floats.usage.prompt_tokens == sum(map(len, tokens))
    short = client.embeddings.create(model="base", input=tokens, dimensions=4, encoding_format="float")
    values = torch.tensor([each.embedding for each in short.data])
    cut = service.engine.embed(tokens, Base()).values[:, :4]
    assert torch.allclose(values, cut / cut.norm(dim=1, keepdim=True), atol=1e-6)
    with pytest.raises(openai.BadRequestError, match="dimensions must be at most 32"):
        client.embeddings.create(model="base", input="a", dimensions=33)


def test_base64_is_little_endian_float32(url):
    asked = {"model": "base", "input": PROMPT}
    raw, plain = (
        httpx.post(f"{url}/v1/embeddings", json={**asked, "encoding_format": kind}).json()["data"][0]["embedding"]
        for kind in ("base64", "float")
    )
    data = base64.b64decode(raw)
    assert struct.unpack(f"<{len(data) // 4}f", data) == pytest.approx(plain, abs=1e-7)


@pytest.mark.parametrize("tokens", [[-1], [2**31], [2**64], [10**30], [5, 96]])
def test_auto_refuses_tokens_that_do_not_exist_before_it_reads_them(client, tokens):
    """A selector reads text, and tokenizers fail on tokens out of their range, each in its way."""
    told = f"the prompt has token {tokens[-1]}, but the model knows tokens 0 to 95"
    for given in (tokens, [tokens], [[5], tokens]):
        with pytest.raises(openai.BadRequestError, match=told):
            client.completions.create(model="auto", prompt=given, **GREEDY)
        with pytest.raises(openai.BadRequestError, match=told):
            client.embeddings.create(model="auto", input=given)


def test_auto_says_what_it_chose_and_why(client, service):
    answer = client.completions.create(model="auto", prompt="the doctor is not the patient", **GREEDY)
    told = answer.model_extra["molora"]
    assert told["adapters"] == {"ann-law": 1.0} and told["selector"] == "topic" and not told["abstained"]
    assert set(told["scores"]) == set(ADAPTERS) and "ann-law" in told["why"]
    assert answer.choices[0].text == engine_text(service, Weighted((("ann-law", 1.0),)))
    chosen = client.embeddings.create(model="auto", input="is it the team or the player").model_extra["molora"]
    assert chosen["weights"] == {"ann-news": 1.0}
    with pytest.raises(openai.BadRequestError, match="selector 'none' is unknown"):
        client.completions.create(model="auto", prompt="a", extra_body={"molora": {"selector": "none"}}, **GREEDY)


def test_trace_tells_the_routing_of_every_token(client, service):
    """Beside the engine's own watcher, whose decisions are averaged over the layers here."""
    heard = []
    ids = service.tokenizer("what a match").input_ids
    sampling = Sampling(temperature=0, max_tokens=3)
    service.engine.submit(Request(ids, Mixture("mix"), sampling), watcher=heard.append).result()
    answer = client.completions.create(
        model="mix", prompt="what a match", temperature=0, max_tokens=3, extra_body={"molora": {"trace": True}}
    )
    told = answer.model_extra["molora"]
    assert told["mixture"] == "mix" and len(told["trace"]) == 3
    assert [one["token"] for one in told["trace"]] == answer.choices[0].text.split()
    assert [one["token"] for one in told["prompt_trace"]] == ["<s>", "what", "a", "match"]
    for number, entry in enumerate(told["trace"]):
        own = [one for one in heard if one.drawn == number]
        gates = torch.stack([one.gates[-1] for one in own]).mean(0)
        shares = [one.probs[-1] / one.probs[-1].sum() for one in own]
        entropy = torch.stack([-(share * share.log()).sum() for share in shares]).mean()
        assert entry["entropy"] == pytest.approx(float(entropy), abs=1e-3)
        for expert, gate in entry["experts"]:
            assert gate == pytest.approx(float(gates[expert]), abs=1e-3)
        assert entry["experts"][0][0] == int(gates.argmax())
    parts = list(client.completions.create(
        model="mix", prompt="what a match", temperature=0, max_tokens=3, stream=True,
        extra_body={"molora": {"trace": True}},
    ))  # fmt: skip
    streamed = [entry for part in parts for entry in part.model_extra.get("molora", {}).get("trace", [])]
    assert streamed == told["trace"]
    alone = client.completions.create(model="base", prompt="a", extra_body={"molora": {"trace": True}}, **GREEDY)
    assert alone.model_extra["molora"] == {"base": True}  # there is no router


@pytest.mark.parametrize("piece", [1, 100, 256, 5000])
def test_of_a_long_prompt_the_last_tokens_are_traced_and_held(client, service, piece):
    """Read in pieces or at once: what is told is that of all decisions, what is held no more than it needs."""
    rng, prompt = torch.Generator().manual_seed(0), [5 + i % 80 for i in range(1500)]
    gates = {layer: torch.rand(len(prompt), 3, generator=rng) for layer in ("a", "b")}
    whole = {"c": torch.rand(1, 3, generator=rng)}  # decides once for the prompt
    tracer = Tracer(service.tokenizer, prompt)
    for start in range(0, len(prompt), piece):
        for layer, of in gates.items():
            tracer(Decision(layer, of[start : start + piece], of[start : start + piece]))
    for layer, of in whole.items():
        tracer(Decision(layer, of, of))
    held = [one for parts in tracer._heard[0].values() for pair in parts for one in pair]
    assert sum(one.untyped_storage().nbytes() for one in held if len(one) > 300) <= 4 * LONGEST * 3 * 4
    assert sum(len(one) for one in held) <= 4 * (LONGEST + min(piece, LONGEST)) + 2
    told = tracer.take([Token(7)])
    mean = (gates["a"] + gates["b"] + whole["c"]) / 3
    assert len(told["prompt_trace"]) == LONGEST
    for entry, token, row in zip(told["prompt_trace"], prompt[-LONGEST:], mean[-LONGEST:], strict=True):
        assert entry["token"] == service.tokenizer.decode([token])
        assert [one for one, _ in entry["experts"]] == row.argsort(descending=True).tolist()
        assert [gate for _, gate in entry["experts"]] == pytest.approx(sorted(row.tolist(), reverse=True), abs=1e-4)
    assert told["trace"][0]["experts"] == told["prompt_trace"][-1]["experts"]


def test_errors_become_the_clients_exceptions(world, tmp_path, monkeypatch):
    with started(with_tenants(world, tmp_path, monkeypatch)) as service, listening(service) as url:

        def client(key):
            return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)

        with pytest.raises(openai.AuthenticationError) as error:
            client("wrong").models.list()
        assert error.value.code == "invalid_api_key"
        ann, plain = client(KEYS["ann"]), client(KEYS["plain"])
        for name in ("bob-secret", "nobody"):
            with pytest.raises(openai.NotFoundError) as error:
                ann.completions.create(model=name, prompt="a")
            assert error.value.code == "model_not_found" and error.value.param == "model"
        with pytest.raises(openai.BadRequestError) as error:
            ann.completions.create(model="base", prompt="a", temperature=9, top_p=0)
        assert "temperature" in str(error.value) and "top_p" in str(error.value)
        with pytest.raises(openai.BadRequestError) as error:
            ann.completions.create(model="base", prompt="a " * 300)
        assert error.value.code == "context_length_exceeded"
        with pytest.raises(openai.PermissionDeniedError):
            plain.post("/load_lora_adapter", cast_to=str, body={"lora_name": "shared", "lora_path": "shared"})
        for _ in range(2):
            plain.completions.create(model="shared", prompt="a", max_tokens=1)
        with pytest.raises(openai.RateLimitError) as error:
            plain.completions.create(model="shared", prompt="a", max_tokens=1)
        assert error.value.code == "rate_limit_exceeded"
        assert 1 <= int(error.value.response.headers["retry-after"]) <= 62
