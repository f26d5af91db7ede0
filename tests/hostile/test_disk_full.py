"""A disk that fills up while MaxText's trainer saves: the run ends and says so, what was saved is whole, and with room
again the run goes on to the same losses as one that was never disturbed.

The disk is full in two ways: no file may grow any more (RLIMIT_FSIZE, which needs no rights: EFBIG), and, where this
process may mount one, a small file system that another file has filled (ENOSPC); skipped where it may not.
"""

import contextlib
import dataclasses
import resource
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from training.stock_runs import arguments, checkpoint, metrics, run, start, write_documents

pytestmark = pytest.mark.hostile

SIZE = 64 * 2**20
SETTINGS = {"checkpoint_period": 1}


def mounting_problem(folder):
  """Mounts a file system of `SIZE` bytes; returns "", or why that cannot be."""
  command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
  try:
    done = subprocess.run(command, capture_output=True, text=True)
  except FileNotFoundError as error:
    return str(error)
  return done.stderr.strip() or "mount failed" if done.returncode else ""


def fill(folder):
  """Writes into a file until the file system is full."""
  with (folder / "ballast").open("wb", buffering=0) as file:
    for size in (2**20, 2**12, 1):
      with contextlib.suppress(OSError):
        while file.write(b"\0" * size) == size:
          pass


def saved(folder):
  """The steps of the checkpoints that are there, those that are being written left out."""
  return sorted(int(path.name) for path in (folder / "run" / "checkpoints").glob("*") if path.name.isdigit())


@dataclasses.dataclass
class Disturbed:
  """What became of a run: its exit code, what it printed, the checkpoints it left, and the first of them."""

  folder: Path
  code: int
  output: str
  saved: list
  first: dict


def disturbed(folder, home, way, disturb, settings):
  """A run into `folder` that is disturbed when its first checkpoint is there."""
  words = arguments(folder, "run", f"first_{way}", 1000, **settings, metrics_file=home / f"first_{way}.jsonl")
  process = start(home, words)
  deadline = time.monotonic() + 500
  while not saved(folder):
    assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-3000:]
    time.sleep(0.002)
  disturb(process)
  output, _ = process.communicate(timeout=500)
  complete = saved(folder)
  return Disturbed(folder, process.returncode, output, complete, checkpoint(folder, "run", complete[0]))


@contextlib.contextmanager
def small_file_system(folder):
  folder.mkdir()
  if problem := mounting_problem(folder):
    pytest.skip(f"a file system to fill cannot be mounted: {problem}")
  try:
    yield
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)


# A checkpoint's data are larger than the limit, the metrics are not.
LIMIT = resource.RLIMIT_FSIZE, (20_000, 20_000)


@pytest.fixture(scope="module", params=["limited", pytest.param("full", marks=pytest.mark.slow)])
def runs(request, tmp_path_factory):
  """(way, home, a run that was disturbed); it goes on afterwards, in one process with one that was not disturbed."""
  way, home = request.param, tmp_path_factory.mktemp("home")
  settings = write_documents(home) | SETTINGS
  folder = home / way
  with small_file_system(folder) if way == "full" else contextlib.nullcontext():
    if way == "full":
      found = disturbed(folder, home, way, lambda _: fill(folder), settings)
      (folder / "ballast").unlink()
    else:
      found = disturbed(folder, home, way, lambda process: resource.prlimit(process.pid, *LIMIT), settings)
    steps = found.saved[-1] + 4
    run(
      home,
      arguments(folder, "run", "", steps, **settings, metrics_file=home / f"second_{way}.jsonl"),
      arguments(home, "straight", "straight", steps, **settings),
    )
  return way, home, found


def test_the_run_ends_with_an_error_that_says_so(runs):
  way, _, found = runs
  reason = {"limited": "File too large", "full": "No space left on device"}[way]
  assert found.code != 0 and reason in found.output, found.output[-3000:]


def test_with_room_it_goes_on_as_if_nothing_had_been(runs):
  way, home, found = runs
  last = found.saved[-1]
  assert found.saved == list(range(found.saved[0], last + 1))
  straight = metrics(home, "straight")
  first, second = metrics(home, f"first_{way}"), metrics(home, f"second_{way}")
  assert set(first) >= set(range(last)) and sorted(second) == list(range(last + 1, len(straight)))
  assert {step: straight[step] for step in first} == first
  assert {step: straight[step] for step in second} == second


def test_what_was_saved_before_is_whole(runs):
  _, home, found = runs
  undisturbed = checkpoint(home, "straight", found.saved[0])
  assert set(found.first) == set(undisturbed)
  for path, value in found.first.items():
    np.testing.assert_array_equal(value, undisturbed[path], err_msg=path)
