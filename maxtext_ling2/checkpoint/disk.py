"""Waiting for the disk: files are on it before they get their name."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

_PERIOD = 0.2  # seconds between two looks at what has been written


def sync(path: Path) -> None:
  """Waits until a file or the entries of a folder are on the disk, mapped writes included."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def sync_tree(folder: Path) -> None:
  """Waits until everything below a folder is on the disk."""
  for path in (*folder.rglob("*"), folder):
    sync(path)


@contextlib.contextmanager
def written_back(files: Callable[[], Iterable[Path]]) -> Iterator[None]:
  """Lets the disk write while the block computes: left to itself the system keeps what is written in memory for long.

  Args:
    files: the files there are by now; one that goes meanwhile is passed over.
  """
  over = threading.Event()

  def write_back() -> None:
    while not over.wait(_PERIOD):
      for file in files():
        with contextlib.suppress(FileNotFoundError):
          sync(file)

  thread = threading.Thread(target=write_back, name="write back")
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()
