"""Sizes of what was written."""

from pathlib import Path


def size(folder: Path) -> int:
  """The bytes of all files below a folder."""
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
