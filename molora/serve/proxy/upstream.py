"""Upstream: the one OpenAI-compatible server that a router forwards to, and what its failures are called.

Its address is fixed when the router starts: nothing of a request becomes part of a URL, redirects are refused, and the
proxies and passwords that the environment may name are not used. Of a client's headers a few harmless ones are
forwarded; its Authorization never is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import httpx

from ...errors import ConfigError
from ..request import ServeError

logger = logging.getLogger("molora.serve")
FORWARDED = ("traceparent", "tracestate", "x-request-id")  # of requests; everything else stays here
RETURNED = ("x-request-id", "openai-processing-ms")  # of answers; also x-ratelimit-...
LISTED = 5.0  # seconds for which the list of models is remembered
PROBE = 5.0  # seconds that a look at the server may take
MAX_MESSAGE = 600  # characters of its own words that are passed on
MAX_ERROR = 64 << 10  # bytes of an error that are read


class Upstream:
    """A server, its connections, and its failures as ServeErrors.

    Args:
        url: without `/v1`.
        key: its API key; None sends none. It is never logged, and taken out of what is passed on.
        timeout: seconds between two signs of life.
        connect_timeout: seconds to connect, and to wait for a free connection.
        retries: of connecting.
        connections: at the same time.
        max_answer: bytes of an answer.
        ca: file of certificates; None: those of the system.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout: float = 300.0,
        connect_timeout: float = 5.0,
        retries: int = 2,
        connections: int = 200,
        max_answer: int = 64 << 20,
        ca: str | None = None,
    ) -> None:
        self.url, self.max_answer, self._key = url, max_answer, key
        try:
            context = ssl.create_default_context(cafile=ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"the certificates in '{ca}' cannot be read: {error}") from error
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=30)
        # compressed answers are not asked for, so that events pass as they come
        headers = {"Accept-Encoding": "identity", "User-Agent": "molora-route"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self._client = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=connect_timeout, pool=connect_timeout),
            # retries are httpx's: of connecting alone, before anything of the request is sent
            transport=httpx.AsyncHTTPTransport(verify=context, retries=retries, limits=limits, trust_env=False),
            follow_redirects=False,
            trust_env=False,
        )
        self._listed: tuple[float, list[dict[str, Any]]] | None = None
        self._listing = asyncio.Lock()

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    async def open(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str], deadline: float) -> Any:
        """Send a request; returns its answer, whose body is not read and which the caller closes.

        Args:
            path: below /v1, one of the router's own.
            body: of the request.
            headers: of the client's request.
            deadline: of the loop's clock.

        Raises:
            ServeError: it cannot be reached, took too long, or answered with an error.
        """
        content = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
        mine = {"Content-Type": "application/json"}
        mine |= {name: headers[name][:256] for name in FORWARDED if name in headers}
        request = self._client.build_request("POST", f"/v1/{path}", content=content, headers=mine)
        with self._failures():
            response = await _until(deadline, self._client.send(request, stream=True))
        if response.status_code == 200:
            return response
        try:
            with self._failures():
                text = await _until(deadline, self._read(response, MAX_ERROR, cut=True))
            raise self._error(response, text)
        finally:
            await response.aclose()

    async def read(self, response: Any, deadline: float) -> dict[str, Any]:
        """Return the JSON object of an answer; raise ServeError when it is something else, or is cut short."""
        with self._failures():
            text = await _until(deadline, self._read(response, self.max_answer))
        return self._object(text)

    async def pieces(self, response: Any, deadline: float) -> AsyncIterator[bytes]:
        """Yield the bytes of an answer as they come; raise ServeError when they stop before their end."""
        found = response.aiter_bytes().__aiter__()
        with self._failures():
            while True:
                try:
                    yield await _until(deadline, found.__anext__())
                except StopAsyncIteration:
                    return

    async def models(self) -> list[dict[str, Any]]:
        """Return what the server lists, at most some seconds old; raise ServeError when it cannot be had."""
        async with self._listing:
            now = time.monotonic()
            if self._listed is None or now - self._listed[0] > LISTED:
                self._listed = now, await self._models()
            return self._listed[1]

    async def _models(self) -> list[dict[str, Any]]:
        deadline = asyncio.get_running_loop().time() + PROBE
        request = self._client.build_request("GET", "/v1/models")
        with self._failures():
            response = await _until(deadline, self._client.send(request, stream=True))
        try:
            with self._failures():
                text = await _until(deadline, self._read(response, self.max_answer))
            if response.status_code != 200:
                raise self._error(response, text[:MAX_ERROR])
        finally:
            await response.aclose()
        data = self._object(text).get("data")
        if not isinstance(data, list):
            raise _invalid("its list of models has no data")
        return [one for one in data if isinstance(one, dict) and isinstance(one.get("id"), str)]

    # --- reading ------------------------------------------------------------------------------------------------------

    async def _read(self, response: Any, most: int, cut: bool = False) -> bytes:
        parts, size = [], 0
        async for part in response.aiter_bytes():
            size += len(part)
            if size > most:
                if cut:
                    break
                raise _invalid(f"its answer has more than {most:,} bytes")
            parts.append(part)
        return b"".join(parts)

    def _object(self, text: bytes) -> dict[str, Any]:
        try:
            told = json.loads(text)
        except (ValueError, RecursionError):
            raise _invalid("its answer is no JSON") from None
        if not isinstance(told, dict):
            raise _invalid("its answer is no JSON object")
        return told

    # --- failures -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn what goes wrong on the way into ServeErrors, which do not say where the server is."""
        try:
            yield
        except httpx.PoolTimeout:
            raise ServeError("the model server is busy; try again", 503, "upstream_busy", retry_after=1.0) from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            logger.warning("%s cannot be reached: %s", self.url, error or type(error).__name__)
            raise ServeError("the model server cannot be reached", 502, "upstream_unreachable") from None
        except (httpx.TimeoutException, asyncio.TimeoutError):
            raise ServeError("the model server took too long", 504, "upstream_timeout") from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            logger.warning("%s broke off: %s", self.url, error or type(error).__name__)
            raise ServeError("the model server broke off its answer", 502, "upstream_closed") from None

    def _error(self, response: Any, text: bytes) -> ServeError:
        """Return an answer that is no success as an error of the OpenAI shape."""
        status = response.status_code
        if status < 400:
            logger.warning("%s answered %d, which is not followed", self.url, status)
            return ServeError("the model server redirects, which is not followed", 502, "upstream_redirect")
        if status in (401, 403):  # about the router's key, of which its words may show a part
            logger.warning("%s refuses the router's key with %d", self.url, status)
            return ServeError("the model server refuses this router", 502, "upstream_refused")
        message, code, param = self.words(text)
        wait = response.headers.get("retry-after", "")
        seconds = float(wait) if wait.isascii() and wait.isdigit() and len(wait) < 7 else None
        default = "invalid_request" if status < 500 else "upstream_error"
        default = {404: "not_found", 429: "rate_limit_exceeded"}.get(status, default)
        # half a second less: what is written into the header is rounded up
        wait_for = None if seconds is None else seconds - 0.5
        message = message or f"the model server answered {status}"
        return ServeError(message, status, code or default, param, wait_for)

    def words(self, text: bytes) -> tuple[str, str | None, str | None]:
        """Return message, code and param of an error in the forms of vLLM, SGLang, LoRAX and OpenAI."""
        try:
            told = json.loads(text)
        except (ValueError, RecursionError):
            return "", None, None
        inner: Any = told.get("error", told) if isinstance(told, dict) else {}
        inner = {"message": inner} if isinstance(inner, str) else inner
        if not isinstance(inner, dict):
            return "", None, None
        message, code, param = (inner.get(name) for name in ("message", "code", "param"))
        message = message if isinstance(message, str) else ""
        if self._key:
            message = message.replace(self._key, "***")
        return (
            message[:MAX_MESSAGE],
            code[:64] if isinstance(code, str) else None,
            param[:64] if isinstance(param, str) else None,
        )


def returned(response: Any) -> dict[str, str]:
    """Return the headers of an answer that a client gets: none that are about the connection, none that set state."""
    kept = {name: value for name, value in response.headers.items() if name in RETURNED or name[:12] == "x-ratelimit-"}
    return {name: value[:256] for name, value in kept.items()}


def _invalid(why: str) -> ServeError:
    logger.warning("the upstream server cannot be understood: %s", why)
    return ServeError("the model server cannot be understood", 502, "upstream_invalid")


async def _until(deadline: float, work: Any) -> Any:
    """Return the result of some work; raise asyncio.TimeoutError at the deadline, when it is cancelled."""
    left = deadline - asyncio.get_running_loop().time()
    return await asyncio.wait_for(work, max(0.0, left) if math.isfinite(left) else None)
