"""How deeply documents from outside may nest: the limit itself, and that nothing deeper overflows a stack."""

import pytest

from nanochat_cli.config.toml import parse_toml
from nanochat_cli.nesting import MAX_DEPTH, parse_json


def nested(depth: int, left: str = "[", right: str = "]", core: str = "") -> str:
    return left * depth + core + right * depth


@pytest.mark.parametrize(("left", "right", "core"), [("[", "]", ""), ('{"a": ', "}", "1"), ('[{"a": ', "}]", "null")])
def test_json_may_nest_up_to_the_limit_and_no_deeper(left, right, core):
    levels = left.count("[") + left.count("{")
    parse_json(nested(MAX_DEPTH // levels, left, right, core))
    for depth in (MAX_DEPTH // levels + 1, 500, 200_000):
        with pytest.raises(ValueError, match="nested"):
            parse_json(nested(depth, left, right, core))


@pytest.mark.parametrize("text", ["1", '"a"', "[]", "{}", '{"a": [1, {"b": 2}]}', b'{"a": 1}'])
def test_shallow_documents_are_read_as_json_reads_them(text):
    import json

    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize("text", ["", "{", "[1,", b"\xff", "nan nan"])
def test_invalid_json_is_a_value_error(text):
    with pytest.raises(ValueError):  # noqa: PT011 - every reader catches exactly this
        parse_json(text)


@pytest.mark.parametrize("text", ["x = " + nested(200), "x = " + "[" * 100_000, ".".join("a" * 70) + " = 1"])
def test_deep_toml_is_refused(text):
    with pytest.raises(ValueError, match="nested"):
        parse_toml(text)
