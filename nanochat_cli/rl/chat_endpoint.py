"""One question to an OpenAI-compatible endpoint (`POST …/chat/completions`), with limits of time and size.

The answer is untrusted text: nothing of it is run or followed here.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from nanochat_cli.errors import ConfigError
from nanochat_cli.nesting import parse_json

MAX_ANSWER = 2**18
"""Bytes; longer answers are rejected."""
KEY_VARIABLE = "NANOCHAT_LESSONS_KEY"
"""Environment variable with the endpoint's key, if it needs one."""
_PIECE = 2**13


class EndpointError(Exception):
    """There is no answer; the message says why."""


@dataclass(frozen=True)
class ChatEndpoint:
    """url: the API's, such as http://localhost:8080/v1; timeout: seconds for a whole answer.

    Raises ConfigError for a URL that is not http(s).
    """

    url: str
    model: str
    timeout: float
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--lessons {self.url}: must start with http:// or https://")

    def ask(self, system: str, user: str) -> str:
        """The text of the answer. Raises EndpointError if there is none: no connection, too late, too long, no text."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        question = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        try:
            body = self._post(json.dumps(question).encode())
        except urllib.error.HTTPError as error:
            with error:
                raise EndpointError(f"status {error.code}") from None
        except urllib.error.URLError as error:
            raise EndpointError(str(error.reason)) from None
        except TimeoutError:
            raise EndpointError(f"no answer in {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            # The message may contain the endpoint's own words, with line ends and terminal codes.
            message = "".join(character for character in str(error) if character.isprintable())[:200]
            raise EndpointError(f"{type(error).__name__}: {message}") from None
        return _text_of(body)

    def _post(self, content: bytes) -> bytes:
        url = self.url.rstrip("/")
        url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(url, content, headers)
        opener = urllib.request.build_opener(_NoRedirects)
        deadline = time.monotonic() + self.timeout
        with opener.open(request, timeout=self.timeout) as response:
            body = bytearray()
            while piece := response.read1(_PIECE):  # read() would wait for an endpoint that sends byte by byte
                body += piece
                if len(body) > MAX_ANSWER:
                    raise EndpointError(f"an answer of more than {MAX_ANSWER} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError
        return bytes(body)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Sends the key only to the endpoint that was named."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


def _text_of(body: bytes) -> str:
    try:
        text = parse_json(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise EndpointError("the answer is not a chat completion") from None
    if not isinstance(text, str):
        raise EndpointError("the answer has no text")
    return text
