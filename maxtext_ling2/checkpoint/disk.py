"""Syncing to disk: files are durable before they get their final name."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

_PERIOD = 0.2  # seconds between two syncs


def sync(path: Path) -> None:
  """Syncs a file, mapped writes included, or the entries of a folder."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def sync_tree(folder: Path) -> None:
  """Syncs everything below a folder."""
  for path in (*folder.rglob("*"), folder):
    sync(path)


@contextlib.contextmanager
def background_fsync(files: Callable[[], Iterable[Path]]) -> Iterator[None]:
  """Syncs files periodically within the context, so that the disk is busy while blocks are computed.

  Args:
    files: returns the files that exist by now; those that vanish are skipped.
  """
  over = threading.Event()

  def sync_files() -> None:
    while not over.wait(_PERIOD):
      for file in files():
        with contextlib.suppress(FileNotFoundError):
          sync(file)

  thread = threading.Thread(target=sync_files, name="background fsync")
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()
