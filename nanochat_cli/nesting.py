"""A limit to how deeply foreign JSON and TOML may nest: ten thousand brackets are refused, not a stack overflow.

Nothing of ours nests deeper than ten levels. Code that walks a document recursively may rely on the limit.
"""

import json
from typing import Any

MAX_DEPTH = 64


def parse_json(text: str | bytes, max_depth: int = MAX_DEPTH) -> Any:
    """Like `json.loads`. Raises ValueError for text that is not JSON, or nests deeper than `max_depth`."""
    try:
        document = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    require_shallow(document, max_depth)
    return document


def require_shallow(document: Any, max_depth: int = MAX_DEPTH) -> None:
    """Raises ValueError when lists and dicts nest deeper than `max_depth`."""
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(max_depth):
        inner = [one for node in level for one in (node.values() if isinstance(node, dict) else node)]
        level = [one for one in inner if isinstance(one, dict | list)]
        if not level:
            return
    raise ValueError(f"nested more than {max_depth} levels deep")
