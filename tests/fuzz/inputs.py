"""Inputs near to good ones: bytes changed, cut, doubled; values of JSON exchanged; or nothing like them at all."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.readers import Reader

# What has broken readers before.
NASTY = (
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\n\n", b"\t", b"\x1c", "\u2028\u3000".encode(),
    b"{", b"}", b"[" * 200, b"[" * 3000, b'"', b"'", b"&a *a", b"<<: *data", b"!!python/object:os.system",
    b"\\ud800", b"NaN", b"-Infinity",
    b"1e999", b"1e39", b"9" * 30, b"-1", b"0x1F", b"1_0", b"null", b"true", b"../../x", b"/etc/passwd", b"\x7f" * 9,
    b"\xff" * 8, b"\x00" * 8,
)  # fmt: skip

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=8)
    | st.sampled_from(["", " ", "p1", "q1", "auto", "../x", "\ud800", "a\u3000b", "\x1f"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed_bytes(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    content = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        end = min(len(content), place + draw(st.sampled_from((0, 0, 1, 1, 2, 4, 8, 64))))
        kind = draw(st.sampled_from(("put", "nasty", "cut", "twice", "flip")))
        if kind == "cut":
            content = content[:place] if draw(st.booleans()) else content[:place] + content[end:]
        elif kind == "twice":
            content = content[:end] + content[place:]
        elif kind == "flip" and place < len(content):
            content = content[:place] + bytes([content[place] ^ (1 << draw(st.integers(0, 7)))]) + content[place + 1 :]
        else:
            new = draw(st.sampled_from(NASTY) if kind == "nasty" else st.binary(max_size=8))
            content = content[:place] + new + content[end:]
    return content


@st.composite
def changed_values(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """JSON, or lines of it, with some values exchanged, fields taken out or added."""
    out = []
    for tree in _trees(draw(st.sampled_from(seeds)).decode("utf-8-sig")):
        some = _changed(draw, tree) if draw(st.booleans()) else tree
        out.append(json.dumps(some, ensure_ascii=draw(st.booleans())))
    return "\n".join(out).encode("utf-8", "surrogatepass")


def _trees(text: str) -> list[Any]:
    """The values of a file that holds one, over several lines perhaps, or of one that holds one a line."""
    try:
        return [json.loads(text)]
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines()] or [{}]


def _changed(draw: st.DrawFn, tree: Any) -> Any:
    if isinstance(tree, dict) and tree:
        key = draw(st.sampled_from(sorted(tree)))
        kind = draw(st.sampled_from(("value", "value", "into", "into", "without", "more")))
        if kind == "without":
            return {name: value for name, value in tree.items() if name != key}
        if kind == "more":
            return {**tree, draw(st.text(max_size=6)): draw(VALUES)}
        return {**tree, key: draw(VALUES) if kind == "value" else _changed(draw, tree[key])}
    if isinstance(tree, list) and tree and draw(st.booleans()):
        place = draw(st.integers(0, len(tree) - 1))
        return [*tree[:place], _changed(draw, tree[place]), *tree[place + 1 :]]
    return draw(VALUES)


def inputs_of(reader: Reader) -> st.SearchStrategy[bytes]:
    """Inputs for a reader."""
    kinds = [changed_bytes(reader.seeds), changed_bytes(reader.seeds), st.binary(max_size=64)]
    if reader.records:
        kinds += [changed_values(reader.seeds)] * 3
    return st.one_of(kinds)
