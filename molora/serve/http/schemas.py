"""The bodies that clients send: OpenAI's, with a field `molora` for what OpenAI does not know.

A field that would change the answer and cannot be honoured is refused, never ignored. What changes nothing here
(`user`, `metadata`, ...) is accepted.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from ..request import Sampling, ServeError

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_INPUTS = 256
Name = Annotated[str, Field(min_length=1, max_length=256)]
# told to a server that does something else with them, or nothing
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Program(_Body):
    """What beside `model` says which experts act: `adapters` with weights, or the selector that `model: auto` asks.

    `trace` asks for the routing of every token.
    """

    adapters: dict[Name, float] | None = Field(default=None, min_length=1, max_length=64)
    selector: Name | None = None
    trace: StrictBool = False


class StreamOptions(_Body):
    """OpenAI's options of a stream."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False


class _Generate(_Body):
    model: Name
    n: StrictInt = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    max_tokens: StrictInt | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: StrictInt = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: StrictInt | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[StrictInt] = Field(default=[], max_length=256)
    min_tokens: StrictInt = 0
    ignore_eos: StrictBool = False
    logit_bias: dict[str, float] | None = Field(default=None, max_length=1024)
    timeout: float | None = Field(default=None, gt=0, le=86400)
    molora: Program | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    def _sampling(self, max_tokens: int | None, logprobs: int | None) -> Sampling:
        def given(value: float | None, default: float) -> float:
            return default if value is None else value

        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=given(self.temperature, 1.0),
            top_p=given(self.top_p, 1.0),
            top_k=max(self.top_k, 0) if self.top_k == -1 else self.top_k,  # vLLM's -1: all
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=given(self.presence_penalty, 0.0),
            frequency_penalty=given(self.frequency_penalty, 0.0),
            seed=self.seed,
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids),
            logprobs=logprobs,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            logit_bias=_biases(self.logit_bias),
        )
        sampling.check()
        return sampling


class Message(_Body):
    """One message of a chat; its content is text, or parts that are text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    refusal: None = None
    tool_calls: None = None
    tool_call_id: str | None = None

    def text(self) -> str:
        """Return the text; raise ServeError for parts of another kind."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        # a part of another kind may have a text beside what cannot be honoured
        wrong = sorted({str(part.get("type")) for part in self.content
                        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str)})  # fmt: skip
        if wrong:
            raise ServeError(
                f"a message has parts of type {', '.join(wrong)}; this server reads text", param="messages"
            )
        return "".join(part["text"] for part in self.content)


class ChatBody(_Generate):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = None
    response_format: dict[str, Any] | None = None
    tools: None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Any = None
    add_generation_prompt: StrictBool = True

    def sampling(self) -> Sampling:
        """Return how tokens are drawn; raise ServeError that names what is out of range or cannot be honoured."""
        kind = (self.response_format or {"type": "text"}).get("type")
        if kind != "text":
            raise ServeError(
                f"response_format '{kind}' is not supported; use 'text', or leave it out", param="response_format"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ServeError("top_logprobs needs logprobs: true", param="top_logprobs")
        most = (self.top_logprobs or 0) if self.logprobs else None
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._sampling(limit, most)


class CompletionBody(_Generate):
    """The body of /v1/completions; prompts are text, several texts, token ids, or several lists of them."""

    prompt: str | list[str] | list[StrictInt] | list[list[StrictInt]]
    logprobs: StrictInt | None = None
    echo: Literal[False] | None = None
    best_of: StrictInt | None = None
    suffix: None = None

    def sampling(self) -> Sampling:
        """Return how tokens are drawn; raise ServeError that names what is out of range or cannot be honoured."""
        if self.best_of is not None and self.best_of != self.n:
            raise ServeError(f"best_of must equal n, got {self.best_of} and {self.n}", param="best_of")
        return self._sampling(16 if self.max_tokens is None else self.max_tokens, self.logprobs)

    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts, each text or token ids."""
        given: Any = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given or len(given) > MAX_PROMPTS or any(len(one) == 0 for one in given):
            raise ServeError(f"prompt must be 1 to {MAX_PROMPTS} prompts, none empty", param="prompt")
        return given


class EmbeddingBody(_Body):
    """The body of /v1/embeddings."""

    model: Name
    input: str | list[str] | list[StrictInt] | list[list[StrictInt]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: StrictInt | None = Field(default=None, ge=1)
    user: Any = None
    molora: Program | None = None

    def inputs(self) -> list[str] | list[list[int]]:
        """Return the inputs, each text or token ids."""
        given: Any = self.input
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not given or len(given) > MAX_INPUTS or any(len(one) == 0 for one in given):
            raise ServeError(f"input must be 1 to {MAX_INPUTS} inputs, none empty", param="input")
        return given


class LoadBody(_Body):
    """The body of POST /v1/adapters: a name of the server's library, loaded under `as_` or its own name."""

    name: Name
    as_: Name | None = Field(default=None, alias="as")
    pin: StrictBool = False


class PinBody(_Body):
    """The body of PATCH /v1/adapters/{name}."""

    pinned: StrictBool


class VllmLoadBody(BaseModel):
    """vLLM's body for /v1/load_lora_adapter; the path is a name of the server's library, no path of its disk."""

    model_config = ConfigDict(extra="ignore")
    lora_name: Name
    lora_path: Name
    load_inplace: StrictBool = False


class VllmUnloadBody(BaseModel):
    """vLLM's body for /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="ignore")
    lora_name: Name


class FeedbackBody(_Body):
    """The body of POST /v1/feedback: how good the answer with this id was, from 0 to 1."""

    response_id: Name
    reward: float = Field(ge=0, le=1)


def _biases(given: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    return tuple((_token(token), bias) for token, bias in (given or {}).items())


def _token(text: str) -> int:
    """Return a token id as JSON writes it; raise ServeError for all else that Python reads as a number."""
    if not (text.isascii() and text.removeprefix("-").isdigit() and len(text) < 20 and str(int(text)) == text):
        raise ServeError(
            f"the keys of logit_bias must be token ids, such as '42', got {text[:40]!r}", param="logit_bias"
        )
    return int(text)
