"""KEY=VALUE overrides of MaxText's command line: the one place where they are parsed and formatted.

MaxText reads a value as YAML in OmegaConf's dialect: `010` is 8, `2024-01-01` is text, an empty value is null, and quotes
keep a text as it is. None of that is repeated here: a user's overrides are passed to MaxText unchanged, so they mean the
same in our commands as in MaxText's.
"""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from maxtext_ling2.errors import Ling2Error


class OverrideError(Ling2Error, ValueError):
  """An override is not a setting of MaxText; the text names it."""


def split(word: str) -> tuple[str, str] | None:
  """Splits an override at its first `=` into (key, value); None if it has no key or no `=`."""
  key, equals, value = word.partition("=")
  return (key, value) if key and equals else None


def parse(words: Iterable[str]) -> dict[str, str]:
  """Returns values by key, as the text that MaxText reads. The last of several overrides of a key counts, as in MaxText.

  Raises:
    OverrideError: an override is not KEY=VALUE, or MaxText could not read its value.
  """
  texts: dict[str, str] = {}
  for word in words:
    setting = split(word)
    if setting is None:
      raise OverrideError(f"{word!r}: not a setting of MaxText; write KEY=VALUE")
    try:
      _read(word)
    except Exception as error:  # errors of YAML and OmegaConf have no common class
      reason = " ".join(str(error).split())
      raise OverrideError(f"{word!r}: MaxText cannot read this value ({reason}); put quotes around it") from error
    texts |= [setting]
  return texts


def as_text(value: Any) -> str:
  """Formats a Python value as the text that MaxText reads as this value; a string is quoted if necessary."""
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, (str, os.PathLike)):
    text = os.fspath(value)
    return text if _needs_no_quotes(text) else json.dumps(text, ensure_ascii=False)
  return "null" if value is None else str(value)


def texts(settings: Mapping[str, Any]) -> dict[str, str]:
  """Formats Python values by key, each by `as_text`."""
  return {key: as_text(value) for key, value in settings.items()}


def join(texts: Mapping[str, str]) -> list[str]:
  """Joins texts by key to overrides."""
  return [f"{key}={text}" for key, text in texts.items()]


def words(settings: Mapping[str, Any]) -> list[str]:
  """Formats Python values by key as overrides."""
  return join(texts(settings))


def _read(word: str) -> Any:
  """Reads an override as MaxText does, before it checks the types of its fields."""
  from omegaconf import OmegaConf

  return OmegaConf.to_container(OmegaConf.from_dotlist([word]), resolve=False)


def _needs_no_quotes(text: str) -> bool:
  try:
    return bool(_read(f"key={text}") == {"key": text})
  except Exception:
    return False
