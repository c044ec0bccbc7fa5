"""A tokenizer trained on the standard library's own sources, shared by the conformance tests."""

import inspect
import json
import textwrap
import typing

import pytest

from nanochat_cli.data.tokenizer import Tokenizer

VOCAB_SIZE = 640


@pytest.fixture(scope="session")
def sources() -> list[str]:
    return [inspect.getsource(module) for module in (textwrap, json, typing)]


@pytest.fixture(scope="session")
def tokenizer(sources: list[str]) -> Tokenizer:
    return Tokenizer.train(sources, VOCAB_SIZE)
