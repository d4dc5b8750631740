"""JSON objects from files nobody vouches for: one meaning or an error."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from pathlib import Path

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200
short = _short.repr  # a value from such a file in a message: escaped, and cut where it is long


def parse_object(data: bytes, path: Path | str, what: str) -> dict:
    """Parses a JSON object, refusing duplicate keys, which readers resolve differently.

    Args:
        data: UTF-8 text.
        path: the file or entry it came from, for messages.
        what: what the object is, for messages.

    Returns:
        The object as a dict.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply, not an object, or a key stands twice.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict:
        result = dict(pairs)
        if len(result) < len(pairs):
            key = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {short(key)} stands twice")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {what} is a JSON {type(value).__name__}; expected an object")
    return value
