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


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Runs that were disturbed in each way, all gone on with in one process afterwards; and one that was not disturbed."""
  home = tmp_path_factory.mktemp("home")
  settings = write_documents(home) | SETTINGS
  limited, full = home / "limited", home / "full"
  full.mkdir()
  found = {}
  limit = resource.RLIMIT_FSIZE, (20_000, 20_000)  # a checkpoint's data are larger, the metrics are not
  found["limited"] = disturbed(limited, home, "limited", lambda process: resource.prlimit(process.pid, *limit), settings)
  problem = mounting_problem(full)
  try:
    if not problem:
      found["full"] = disturbed(full, home, "full", lambda _: fill(full), settings)
      (full / "ballast").unlink()
    steps = max(one.saved[-1] for one in found.values()) + 4
    second = [
      arguments(one.folder, "run", "", steps, **settings, metrics_file=home / f"second_{way}.jsonl")
      for way, one in found.items()
    ]
    run(home, *second, arguments(home, "straight", "straight", steps, **settings))
  finally:
    if not problem:
      subprocess.run(["umount", "-l", str(full)], check=True)
  return home, found, problem


@pytest.fixture(params=["limited", "full"])
def way(runs, request):
  _, found, problem = runs
  if request.param not in found:
    pytest.skip(f"a file system to fill cannot be mounted: {problem}")
  return request.param


def test_the_run_ends_with_an_error_that_says_so(runs, way):
  _, found, _ = runs
  reason = {"limited": "File too large", "full": "No space left on device"}[way]
  assert found[way].code != 0 and reason in found[way].output, found[way].output[-3000:]


def test_with_room_it_goes_on_as_if_nothing_had_been(runs, way):
  home, found, _ = runs
  last = found[way].saved[-1]
  assert found[way].saved == list(range(found[way].saved[0], last + 1))
  straight = metrics(home, "straight")
  first, second = metrics(home, f"first_{way}"), metrics(home, f"second_{way}")
  assert set(first) >= set(range(last)) and sorted(second) == list(range(last + 1, len(straight)))
  assert {step: straight[step] for step in first} == first
  assert {step: straight[step] for step in second} == second


def test_what_was_saved_before_is_whole(runs, way):
  home, found, _ = runs
  undisturbed = checkpoint(home, "straight", found[way].saved[0])
  assert set(found[way].first) == set(undisturbed)
  for path, value in found[way].first.items():
    np.testing.assert_array_equal(value, undisturbed[path], err_msg=path)
