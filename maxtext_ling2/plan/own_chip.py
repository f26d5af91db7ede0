"""A chip of the user's own: a YAML file with figures that differ from those of a topology's generation."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maxtext_ling2.errors import Ling2Error
from maxtext_ling2.plan.chips import CHIPS, Chip, chip_of

FIELDS = {field.name: field.type for field in dataclasses.fields(Chip)}


class ChipError(Ling2Error, ValueError):
  """A file does not describe a chip."""


def read(file: Path) -> dict[str, Any]:
  """Some of the fields of `plan.chips.Chip`, in its units, from a YAML file.

  Raises:
    ChipError: the file is not there, not YAML, has a field that a chip does not have, or a value that is no such figure.
  """
  import yaml

  if not file.is_file():
    raise ChipError(
      f"--chip {file}: no such file; write a YAML file with some of {', '.join(FIELDS)} (`plan --list` has those of "
      f"{', '.join(CHIPS)})"
    )
  try:
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
  except (yaml.YAMLError, UnicodeDecodeError) as error:
    why = " ".join(str(error).split())
    raise ChipError(f"--chip {file}: not YAML ({why}); write lines such as flops: 9.18e14") from error
  if not isinstance(found, dict) or not found:
    what = "nothing" if not found else f"a {type(found).__name__}"
    raise ChipError(f"--chip {file}: holds {what} instead of figures; write lines such as flops: 9.18e14")
  return {str(name): _figure(file, str(name), value) for name, value in found.items()}


def _figure(file: Path, name: str, value: Any) -> Any:
  if name not in FIELDS:
    close = difflib.get_close_matches(name, FIELDS, 1)
    hint = f"did you mean {close[0]}?" if close else f"use some of {', '.join(FIELDS)}"
    raise ChipError(f"--chip {file}: {name} is no figure of a chip; {hint}")
  if FIELDS[name] is str:
    return str(value)
  whole = FIELDS[name] is int
  try:
    number = math.nan if isinstance(value, bool) else float(value)  # YAML takes 9.18e14, without a sign, for text
  except (TypeError, ValueError):
    number = math.nan
  if not (0 < number < math.inf) or (whole and not number.is_integer()):
    kind = "a whole number of at least 1" if whole else "a positive number"
    raise ChipError(f"--chip {file}: {name}={value!r} is not {kind}; correct it, or leave it out")
  return int(number) if whole else number


def check(figures: Mapping[str, Any], topology: str) -> None:
  """Raises ChipError if a chip has more memory than the compiler for a topology can be told of."""
  chip = chip_of(topology)
  if figures.get("memory", 0) > chip.memory:
    raise ChipError(
      f"--chip: memory={figures['memory']:.0f} is more than the {chip.memory:.0f} bytes of {chip.name}, for which the "
      "program is compiled, and its compiler takes no more; give at most that, or a --topology of larger chips"
    )
