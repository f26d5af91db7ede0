"""Sizes of what was written."""

from pathlib import Path


def size(folder: Path) -> int:
  """The bytes of all files below a folder."""
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def as_text(size: float) -> str:
  """Bytes in decimal units, with three digits."""
  for unit in ("B", "kB", "MB", "GB"):
    if size < 999.5:
      return f"{size:.3g} {unit}"
    size /= 1000
  return f"{size:,.1f} TB"
