"""JSON objects from files nobody vouches for: one meaning or an error."""

from __future__ import annotations

import json
from pathlib import Path


def parse_object(data: bytes, path: Path, what: str) -> dict:
    """Parses a JSON object, refusing duplicate keys, which readers resolve differently.

    Args:
        data: UTF-8 text.
        path: the file it came from, for messages.
        what: what the object is, for messages.

    Returns:
        The object as a dict.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply, not an object, or a key stands twice.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict:
        keys = [key for key, _ in pairs]
        for key in keys if len(set(keys)) < len(keys) else ():
            if keys.count(key) > 1:
                raise ValueError(f"the key {key[:200]!r} stands twice")
        return dict(pairs)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {what} is a JSON {type(value).__name__}; expected an object")
    return value
