"""How deep JSON and TOML from outside may nest: a file of ten thousand brackets is refused and overflows no stack.

Nothing of ours nests deeper than ten levels. What walks a document recursively may rely on the limit.
"""

import json
from typing import Any

MAX_DEPTH = 64


def parse_json(text: str | bytes, max_depth: int = MAX_DEPTH) -> Any:
    """As `json.loads`. Raises ValueError for text that is no JSON, or nests deeper than `max_depth`."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    require_shallow(found, max_depth)
    return found


def require_shallow(document: Any, max_depth: int = MAX_DEPTH) -> None:
    """Raises ValueError when lists and dicts nest deeper than `max_depth`."""
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(max_depth):
        inner = [one for node in level for one in (node.values() if isinstance(node, dict) else node)]
        level = [one for one in inner if isinstance(one, dict | list)]
        if not level:
            return
    raise ValueError(f"nested more than {max_depth} levels deep")
