"""KEY=VALUE words, the settings of MaxText's command line: the one place where they are parsed and written.

MaxText reads the value of a word as YAML in OmegaConf's dialect: `010` is 8, `2024-01-01` is text, an empty value is
null, and quotes keep a text as it is. None of that is repeated here: a user's words go to MaxText as they are, and mean
the same to our commands as to MaxText's.
"""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from maxtext_ling2.errors import Ling2Error


class OverrideError(Ling2Error, ValueError):
  """A word is not a setting of MaxText; the text names it."""


def split(word: str) -> tuple[str, str] | None:
  """(key, value) of a word, split at its first `=`; None: it has no key or no `=`."""
  key, equals, value = word.partition("=")
  return (key, value) if key and equals else None


def parse(words: Iterable[str]) -> dict[str, str]:
  """Values by key, as the text that MaxText reads. Of two words for one key the last counts, as in MaxText.

  Raises:
    OverrideError: a word is not KEY=VALUE, or MaxText could not read its value.
  """
  texts: dict[str, str] = {}
  for word in words:
    setting = split(word)
    if setting is None:
      raise OverrideError(f"{word!r}: not a setting of MaxText; write KEY=VALUE")
    try:
      _read(word)
    except Exception as error:  # YAML's errors, and OmegaConf's, which have no common class
      reason = " ".join(str(error).split())
      raise OverrideError(f"{word!r}: MaxText cannot read this value ({reason}); put quotes around it") from error
    texts |= [setting]
  return texts


def as_text(value: Any) -> str:
  """A Python value as the text that MaxText reads as this value; a string is put in quotes where it needs them."""
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, (str, os.PathLike)):
    text = os.fspath(value)
    return text if _is_read_as_it_stands(text) else json.dumps(text, ensure_ascii=False)
  return "null" if value is None else str(value)


def texts(settings: Mapping[str, Any]) -> dict[str, str]:
  """Python values by key as `as_text` writes them."""
  return {key: as_text(value) for key, value in settings.items()}


def join(texts: Mapping[str, str]) -> list[str]:
  """The words of texts by key."""
  return [f"{key}={text}" for key, text in texts.items()]


def words(settings: Mapping[str, Any]) -> list[str]:
  """Python values by key as words."""
  return join(texts(settings))


def _read(word: str) -> Any:
  """What MaxText reads, before it looks at the types of its fields."""
  from omegaconf import OmegaConf

  return OmegaConf.to_container(OmegaConf.from_dotlist([word]), resolve=False)


def _is_read_as_it_stands(text: str) -> bool:
  try:
    return bool(_read(f"key={text}") == {"key": text})
  except Exception:
    return False
