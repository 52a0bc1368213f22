"""Hypothesis strategies for damaged files."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "x", "../x", "/x", "a\0b"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=3,
)


def _places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(place for key, value in inner for place in _places(value, (*path, key)))]


@st.composite
def damaged(draw: st.DrawFn, content: bytes, is_json: bool) -> bytes:
    """Cut off, zeroed, some bytes others; of JSON, a value that is missing or another."""
    kind = draw(st.sampled_from(["cut", "zero", "bytes", *["value"] * 3 * is_json]))
    if kind == "cut":
        return content[: draw(st.integers(0, len(content) - 1))]
    if kind == "zero":
        return bytes(len(content))
    if kind == "bytes":
        changed = bytearray(content)
        places = st.integers(0, len(content) - 1) | st.integers(0, min(64, len(content) - 1))
        for place in draw(st.lists(places, min_size=1, max_size=8)):
            changed[place] = draw(st.integers(0, 255))
        return bytes(changed)
    tree = copy.deepcopy(json.loads(content))
    *path, last = draw(st.sampled_from(_places(tree)[1:]))
    parent = tree
    for key in path:
        parent = parent[key]
    if draw(st.booleans()):
        parent[last] = draw(JSON)
    else:
        del parent[last]
    return json.dumps(tree).encode()
