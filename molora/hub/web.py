"""Web: requests to a Hugging Face Hub that stay on the hosts they are allowed, wait when told to, and say what failed.

It uses huggingface_hub's client, token and offline switch. Redirects are followed by hand, because each target is
checked first: a file of the Hub may be stored with its content network, and nowhere else. The token is sent to the
Hub alone.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urljoin, urlsplit

import huggingface_hub
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers

from ..errors import LoadError
from ..headers import shown

# Where huggingface.co stores files: cdn-lfs.hf.co, cas-bridge.xethub.hf.co, cdn-lfs.huggingface.co, ...
STORES = (".hf.co", ".huggingface.co")
MAX_ANSWER = 16_000_000  # bytes of an answer in JSON
MAX_REDIRECTS = 5
TRY_AGAIN = (408, 429, 500, 502, 503, 504)


class Unreachable(LoadError):
    """The Hub cannot be reached: no network, or offline mode; a copy in the cache may do."""


class Broken(LoadError):
    """The connection broke while an answer came in; asking for the rest may help."""


class Web:
    """A client for one Hub.

    Args:
        endpoint: its address; by default that of huggingface_hub (HF_ENDPOINT).
        token: for private repositories; None for the one that was saved by `hf auth login`, False for none.
        hosts: more hosts ("files.example.com" or "10.0.0.5:8080") that it may redirect to.
        attempts: how often a request is tried that the server cannot serve now (429, 5xx).
        longest_wait: seconds; a server that asks for more is taken at its word and given up.
        timeout: seconds without any byte.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        token: str | bool | None = None,
        *,
        hosts: Sequence[str] = (),
        attempts: int = 5,
        longest_wait: float = 60.0,
        timeout: float = 30.0,
    ) -> None:
        self.endpoint = (endpoint or huggingface_hub.constants.ENDPOINT).rstrip("/")
        self.token = token
        self.hosts = tuple(hosts)
        self.attempts, self.longest_wait, self.timeout = attempts, longest_wait, timeout

    # --- what is asked ------------------------------------------------------------------------------------------------

    def json(self, url: str) -> Any:
        """Return the JSON behind a URL; raise LoadError when it is none, or too large."""
        with self.get(url) as (response, _):
            text = bytearray()
            for block in self.blocks(response):
                text += block
                if len(text) > MAX_ANSWER:
                    raise LoadError(f"{url} answers with more than {MAX_ANSWER:,} bytes")
        try:
            return json.loads(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise LoadError(f"{url} does not answer with JSON: {shown(error)}") from None

    @contextlib.contextmanager
    def get(self, url: str, start: int = 0) -> Iterator[tuple[Any, dict[str, str]]]:
        """Yield the open answer to a GET of a URL from byte `start` on, and what the Hub said about the file before it.

        The answer's status is 206 when it starts there, 200 when it starts at byte 0, 416 when there is no such byte.

        Raises:
            Unreachable: there is no way to the Hub.
            LoadError: the Hub, or the user's rights, do not give it.
        """
        with contextlib.ExitStack() as stack:
            origin: dict[str, str] = {}
            for _ in range(MAX_REDIRECTS + 1):
                response = self._open(stack, url, start)
                for key in ("x-repo-commit", "x-linked-etag", "x-linked-size"):
                    if key in response.headers:
                        origin.setdefault(key, response.headers[key])
                if not response.has_redirect_location:
                    break
                target = urljoin(url, response.headers["location"])
                if not self.allows(target):
                    raise LoadError(
                        f"{_site(url)} redirects to {shown(_site(target))}, which is not one of the hosts it may use; "
                        "if you trust that host, name it in hosts="
                    )
                stack.close()
                url = target
            else:
                raise LoadError(f"{_site(url)} redirects more than {MAX_REDIRECTS} times")
            if response.status_code >= 400 and response.status_code != 416:
                raise LoadError(_why(response, url))
            yield response, origin

    def blocks(self, response: Any) -> Iterator[bytes]:
        """Yield the bytes of an answer as they come, never decompressed; raise Broken when they stop."""
        try:
            yield from response.iter_raw()
        except _errors() as error:
            raise Broken(
                f"the connection to {response.url.host} broke: {shown(error) or type(error).__name__}"
            ) from error

    def allows(self, url: str) -> bool:
        """Whether requests may be redirected to a URL."""
        parts, own = urlsplit(url), urlsplit(self.endpoint)
        if _site(url) == _site(self.endpoint):
            return True
        if parts.scheme not in ("http", "https") or (own.scheme == "https" and parts.scheme != "https"):
            return False
        host = (parts.hostname or "").lower()
        if {host, parts.netloc.rpartition("@")[2].lower()} & {name.lower() for name in self.hosts}:
            return True
        is_public = (own.hostname or "").endswith("huggingface.co")
        return is_public and _site(url) == f"https://{host}:443" and host.endswith(STORES)

    # --- how it is asked ----------------------------------------------------------------------------------------------

    def _open(self, stack: contextlib.ExitStack, url: str, start: int) -> Any:
        """Return an open response, trying again while the server says that it cannot now."""
        is_home = _site(url) == _site(self.endpoint)
        headers = build_hf_headers(token=self.token if is_home else False, library_name="molora")
        headers["Accept-Encoding"] = "identity"  # sizes and ranges count the bytes of the file
        if start:
            headers["Range"] = f"bytes={start}-"
        for attempt in range(1, self.attempts + 1):
            client = huggingface_hub.get_session()
            opened = client.stream("GET", url, headers=headers, follow_redirects=False, timeout=self.timeout)
            try:
                response = stack.enter_context(opened)
            except OfflineModeIsEnabled as error:
                raise Unreachable(f"offline mode is on (HF_HUB_OFFLINE), so {_site(url)} is not asked") from error
            except _errors() as error:
                if attempt < self.attempts:
                    time.sleep(min(0.2 * 2**attempt, self.longest_wait))
                    continue
                raise Unreachable(f"{_site(url)} cannot be reached: {shown(error) or type(error).__name__}") from error
            if response.status_code not in TRY_AGAIN:
                return response
            wait = _retry_after(response.headers)
            wait = min(0.5 * 2**attempt, self.longest_wait) if wait is None else wait
            if attempt == self.attempts or wait > self.longest_wait:
                more = f"; it asks to wait {wait:.0f} s" if wait > self.longest_wait else f", {attempt} times"
                raise LoadError(f"{_why(response, url)}{more}: try again later")
            stack.close()
            time.sleep(wait)
        raise AssertionError("not reached")


def _errors() -> tuple[type[Exception], ...]:
    """Return what the client of huggingface_hub raises: version 1 talks through httpx, version 2 through httpx2."""
    names = [cls.__module__.partition(".")[0] for cls in type(huggingface_hub.get_session()).__mro__]
    library = sys.modules[next(name for name in names if name in ("httpx", "httpx2"))]
    return (library.HTTPError, library.StreamError, library.InvalidURL)


def _site(url: str) -> str:
    """Return scheme, host and port of a URL."""
    parts = urlsplit(url)
    try:
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        port = None
    return f"{parts.scheme}://{(parts.hostname or '').lower()}:{port}"


def _retry_after(headers: Any) -> float | None:
    """Return the seconds that a server asks to wait: a number, or a date."""
    text = (headers.get("retry-after") or "").strip()
    if text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _why(response: Any, url: str) -> str:
    """Return what a status means for a user."""
    code, status = response.headers.get("x-error-code", ""), response.status_code
    message = response.headers.get("x-error-message") or ""
    told = f" ({shown(message)})" if message else ""
    what = f"{_site(url)}{urlsplit(url).path}"
    if code == "RevisionNotFound":
        return f"there is no such revision: {what}{told}; see the repository's branches, tags and commits"
    if code == "EntryNotFound":
        return f"there is no such file: {what}{told}"
    if code == "GatedRepo":
        return f"{what} is gated{told}: ask for access on its page, then give your token"
    if status in (401, 403):
        return (
            f"{what} may not be read ({status}){told}: it is private, or is not there; log in with `hf auth login`, "
            "or give a token that may read it"
        )
    if status == 404:
        return f"there is nothing at {what} (404){told}: check the name"
    if status == 429:
        return f"{_site(url)} has too many requests (429){told}"
    return f"{what} failed with status {status}{told}"
