"""A judge behind an OpenAI-compatible endpoint: `POST BASE_URL/chat/completions`."""

from __future__ import annotations

import json
import math
import os
import random
import re
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPException
from threading import Event
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from sdft.examples import Message
from sdft.redaction import HIDDEN, redacted_text
from sdft.scorers.judge_model import JudgeError, JudgeModel, Reply, Usage

AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
LONGEST_WAIT = 60.0  # seconds, whatever the server says
LARGEST_BODY = 8 << 20


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the key would go wherever it points."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        """Never."""


_OPENER = urllib.request.build_opener(NoRedirect)


class ChatEndpoint(JudgeModel):
    """A model behind any OpenAI-compatible endpoint: a hosted one, vLLM, llama.cpp, Ollama.

    Args:
        base_url: Where `/chat/completions` lies, as `http://localhost:8000/v1`.
        model: The model's name there.
        key_variable: Environment variable that holds the API key; no key is sent when it is unset.
            The key is read when it is needed, and never logged or written.
        max_reply: Longest reply, in tokens.
        temperature: 0 asks for the likeliest reply.
        options: Further fields of each request; null leaves a field out (`{max_tokens: null,
            max_completion_tokens: 1024}`).
        timeout_s: Seconds to wait for one reply.
        retries: How often a request is sent again after a failure that may pass (no connection,
            429, 500 and their like, a body that is no reply).
        backoff_s: Seconds before the first repetition; they double each time, and a server's
            `Retry-After` is heeded.
        concurrency: Requests at the same time.
        prompt_price: Price of a million tokens read; costs are in the same money.
        completion_price: Price of a million tokens written.

    Raises:
        ValueError: No URL, or a number out of range.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key_variable: str | None = "OPENAI_API_KEY",
        max_reply: int = 512,
        temperature: float = 0.0,
        options: dict[str, Any] | None = None,
        timeout_s: float = 120.0,
        retries: int = 5,
        backoff_s: float = 1.0,
        concurrency: int = 8,
        prompt_price: float | None = None,
        completion_price: float | None = None,
    ) -> None:
        if urlsplit(base_url).scheme not in ("http", "https") or not urlsplit(base_url).netloc:
            raise ValueError(f"ChatEndpoint: base_url must be http(s)://…, found {base_url!r}")
        if key_variable is not None and not re.fullmatch(r"[A-Za-z_]\w*", key_variable):
            # Not shown: it may be the key itself.
            raise ValueError("ChatEndpoint: key_variable is the name of an environment variable")
        for name, value, least in (
            ("max_reply", max_reply, 1),
            ("temperature", temperature, 0),
            ("timeout_s", timeout_s, 0.001),
            ("retries", retries, 0),
            ("backoff_s", backoff_s, 0),
            ("concurrency", concurrency, 1),
            ("prompt_price", prompt_price or 0, 0),
            ("completion_price", completion_price or 0, 0),
        ):
            if not (value >= least and math.isfinite(value)):
                raise ValueError(f"ChatEndpoint: {name} must be {least} or more, found {value}")
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.key_variable = key_variable
        self.fields = {"temperature": temperature, "max_tokens": max_reply, **(options or {})}
        self.timeout_s = timeout_s
        self.retries = retries
        self.backoff_s = backoff_s
        self.concurrency = concurrency
        self.prompt_price = prompt_price
        self.completion_price = completion_price

    @property
    def name(self) -> str:
        """The model's."""
        return self.model

    @property
    def identity(self) -> str:
        """The model and how it is asked; not where: the same model may move to another port."""
        return f"{self.model} {json.dumps(self.fields, sort_keys=True)}"

    def price(self, usage: Usage) -> float | None:
        """What that much costs; None where no price is set."""
        if self.prompt_price is None and self.completion_price is None:
            return None
        read = usage.prompt_tokens * (self.prompt_price or 0.0)
        return (read + usage.completion_tokens * (self.completion_price or 0.0)) / 1e6

    def replies(self, conversations: Sequence[Sequence[Message]]) -> Iterator[tuple[int, Reply]]:
        """Ask for several at a time; the first failure ends the asking."""
        stop, failed = Event(), list[JudgeError]()
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge") as pool:
            places = {pool.submit(self._ask, t, stop): i for i, t in enumerate(conversations)}
            try:
                for future in as_completed(places):
                    error = future.exception()
                    if isinstance(error, JudgeError):
                        failed.append(error)
                    elif (reply := future.result()) is not None:
                        yield places[future], reply
            finally:  # also when nobody wants the rest
                stop.set()
        if failed:
            for error in failed[1:]:
                failed[0].usage.add(error.usage)
            raise failed[0]

    # ---------------------------------------------------------------- one request

    def _ask(self, conversation: Sequence[Message], stop: Event) -> Reply | None:
        """The reply; None where it was not asked for, since another request has failed."""
        if stop.is_set():
            return None
        usage = Usage()
        while True:
            try:
                return self._request(conversation, usage)
            except _Failure as failure:
                if usage.retries >= self.retries or not failure.may_pass or stop.is_set():
                    stop.set()
                    times = f" after {usage.retries + 1} requests" if usage.retries else ""
                    raise JudgeError(
                        f"the judge {self.model!r} at {redacted_text(self.base_url)} does not "
                        f"answer{times}: {failure.reason}",
                        usage,
                    ) from None
                usage.retries += 1
                stop.wait(self._pause(usage.retries, failure.wait_s))

    def _pause(self, attempt: int, asked_s: float | None) -> float:
        """Seconds: doubled each time, spread out so that requests do not return in step."""
        own = self.backoff_s * 2.0 ** (attempt - 1) * random.Random().uniform(0.75, 1.25)
        return min(LONGEST_WAIT, max(own, asked_s or 0.0))

    def _request(self, conversation: Sequence[Message], usage: Usage) -> Reply:
        try:
            with _OPENER.open(self._message(conversation), timeout=self.timeout_s) as answer:
                body = answer.read(LARGEST_BODY)
        except HTTPError as error:
            with error:
                raise self._refused(error) from None
        except (OSError, HTTPException) as error:  # no connection, a timeout, a broken answer
            raise _Failure(" ".join(str(error).split()) or type(error).__name__) from None
        return self._reply(body, usage)

    def _message(self, conversation: Sequence[Message]) -> urllib.request.Request:
        fields = {name: value for name, value in self.fields.items() if value is not None}
        body = {"model": self.model, "messages": [dict(m) for m in conversation], **fields}
        headers = {"Content-Type": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.base_url}/chat/completions"
        return urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")

    def _key(self) -> str:
        return os.environ.get(self.key_variable, "").strip() if self.key_variable else ""

    def _refused(self, error: HTTPError) -> _Failure:
        told = " ".join(error.read(2000).decode("utf-8", "replace").split())[:300]
        key = self._key()
        told = redacted_text(told.replace(key, HIDDEN) if key else told)
        reason = f"HTTP {error.code} {error.reason}" + (f": {told}" if told else "")
        if error.code in (401, 403) and self.key_variable:
            state = "is set" if key else "is not set"
            reason += f" (the environment variable {self.key_variable} {state})"
        return _Failure(reason, error.code in AGAIN, _seconds(error.headers.get("Retry-After")))

    def _reply(self, body: bytes, usage: Usage) -> Reply:
        try:
            answer = json.loads(body)
            text = answer["choices"][0]["message"]["content"]
            spent = answer.get("usage") or {}
            counts = [int(spent.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion")]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            shown = redacted_text(body[:120].decode("utf-8", "replace"))
            raise _Failure(f"its answer is no chat completion: {shown!r}") from None
        usage.calls += 1
        usage.prompt_tokens += counts[0]
        usage.completion_tokens += counts[1]
        return Reply(text if isinstance(text, str) else "", usage)


class _Failure(Exception):
    """One request failed."""

    def __init__(self, reason: str, may_pass: bool = True, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.may_pass = may_pass
        self.wait_s = wait_s


def _seconds(text: str | None) -> float | None:
    """`Retry-After` in seconds; a date there is not worth parsing."""
    return float(text) if text and re.fullmatch(r"\d+(\.\d+)?", text.strip()) else None
