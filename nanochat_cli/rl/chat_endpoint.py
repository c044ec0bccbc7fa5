"""One question to an OpenAI-compatible endpoint (`POST …/chat/completions`), within a time and a size.

What comes back is text that nobody has read: nothing of it is run or followed here.
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
"""Bytes of an answer; a longer one is none."""
KEY_VARIABLE = "NANOCHAT_LESSONS_KEY"
"""Environment variable with the endpoint's key, where it wants one."""
_PIECE = 2**13


class EndpointError(Exception):
    """Why there is no answer, in words."""


@dataclass(frozen=True)
class ChatEndpoint:
    """url: of the API, such as http://localhost:8080/v1; timeout: seconds for a whole answer.

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
        """The text of the answer. Raises EndpointError without one: no connection, too late, too long, no text."""
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
            # What it says may be the endpoint's own words, line ends and codes for terminals included.
            said = "".join(character for character in str(error) if character.isprintable())[:200]
            raise EndpointError(f"{type(error).__name__}: {said}") from None
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
            found = bytearray()
            while piece := response.read1(_PIECE):  # not read(): that waits for an endpoint that drips
                found += piece
                if len(found) > MAX_ANSWER:
                    raise EndpointError(f"an answer of more than {MAX_ANSWER} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError
        return bytes(found)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key goes to the endpoint that was named and to no other."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


def _text_of(body: bytes) -> str:
    try:
        text = parse_json(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise EndpointError("the answer is no chat completion") from None
    if not isinstance(text, str):
        raise EndpointError("the answer has no text")
    return text
