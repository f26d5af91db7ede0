"""JSON objects in which no key stands twice: json.loads would silently keep the last value."""

from typing import Any


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """The object of these pairs, as `object_pairs_hook` of json.loads.

  Raises:
    ValueError: a key stands there twice; it is named.
  """
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
  return found
