"""What is kept between processes: where, and under a digest of what."""

import hashlib
import os
from pathlib import Path


def folder() -> Path:
  """The folder of what this package keeps for a user; it may not exist."""
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maxtext-ling2"


def write(file: Path, text: str) -> None:
  """Writes a file in `folder()`; another process sees all of it or nothing."""
  file.parent.mkdir(parents=True, exist_ok=True)
  partial = file.with_suffix(f".{os.getpid()}")
  partial.write_text(text, encoding="utf-8")
  partial.replace(file)


def digest(path: Path) -> str:
  """SHA-256 of a file, in hexadecimal; "" where there is none."""
  return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def digest_of(folder: Path, suffixes: tuple[str, ...]) -> str:
  """Digest of the files of a folder whose names have one of the suffixes: paths within the folder, and bytes."""
  total = hashlib.sha256()
  for path in sorted(path for path in folder.rglob("*") if path.suffix in suffixes):
    total.update(f"{path.relative_to(folder)}\0{digest(path)}\0".encode())
  return total.hexdigest()
