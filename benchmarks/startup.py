"""What the plugin costs each interpreter start, and when its commands first say something.

First: ``python -c pass`` with and without it, in turn, in two fresh virtual environments, which differ by nothing but the
plugin. The second line is for places where no byte code may be written (PYTHONDONTWRITEBYTECODE, read-only folders), so
that each start compiles the start-up modules.

Then: each command in this environment, from its start to its first character on the screen, and to its end.
"""

import compileall
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAIRS = 50
LIMIT_MS = 2.0

RUNS = 3
COMMANDS = {  # command line -> seconds within which something has to be on the screen
  "--version": 1.0,
  "--help": 1.0,
  "plan --help": 1.0,
  "recipe": 1.0,
  "config nowhere": 2.0,
  "batch nowhere.yml": 2.0,
  "generate nowhere --prompt a": 2.0,
  "eval nowhere --text nowhere": 2.0,
  "verify nowhere --reference nowhere": 2.0,
  "plan --list": 2.0,
  "doctor": 2.0,
}


def make_environment(folder: Path, *, plugin: bool, byte_code: bool = True) -> Path:
  venv.create(folder, symlinks=True)
  site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
  if plugin:
    shutil.copytree(ROOT / "maxtext_ling2", site / "maxtext_ling2", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (ROOT / "site_files").iterdir():
      shutil.copy(file, site)
    if byte_code:
      compileall.compile_dir(site, quiet=1)
  return folder / "bin" / "python"


def milliseconds(python: Path) -> float:
  environ = {"PATH": os.defpath, "PYTHONDONTWRITEBYTECODE": "1"}
  start = time.perf_counter()
  subprocess.run([python, "-c", "pass"], env=environ, check=True)
  return (time.perf_counter() - start) * 1000


def compare(title: str, without: Path, with_plugin: Path) -> float:
  """Print the medians of interleaved runs, and return their difference."""
  for python in (without, with_plugin):
    milliseconds(python)  # once for the file cache
  pairs = [(milliseconds(without), milliseconds(with_plugin)) for _ in range(PAIRS)]
  without_ms, with_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
  print(f"{title:<14}{without_ms:10.2f} ms{with_ms:10.2f} ms{with_ms - without_ms:10.2f} ms", flush=True)
  return with_ms - without_ms


def seconds_of(line: str) -> tuple[float, float]:
  """Seconds until a command's first character on the screen, and until its end."""
  start = time.perf_counter()
  command = [sys.executable, "-m", "maxtext_ling2", *line.split()]
  with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
    process.stdout.read(1)
    first = time.perf_counter() - start
    process.stdout.read()
  return first, time.perf_counter() - start


def commands() -> None:
  """Print the fastest of a few runs of each command."""
  print(f"\n`maxtext-ling2 ...`, the fastest of {RUNS} runs")
  print(f"{'':<36}{'first word':>12}{'end':>12}{'limit':>10}")
  for line, limit in COMMANDS.items():
    first, end = (min(column) for column in zip(*(seconds_of(line) for _ in range(RUNS)), strict=True))
    verdict = "" if first < limit else "  NOT met"
    print(f"{line:<36}{first:10.2f} s{end:10.2f} s{limit:8.1f} s{verdict}", flush=True)


def main() -> None:
  with tempfile.TemporaryDirectory() as folder:
    base = Path(folder)
    without = make_environment(base / "without", plugin=False)
    print(f"`python -c pass`, medians of {PAIRS} interleaved pairs")
    print(f"{'':<14}{'without':>13}{'with':>13}{'difference':>13}")
    cost = compare("installed", without, make_environment(base / "with", plugin=True))
    compare("no byte code", without, make_environment(base / "source", plugin=True, byte_code=False))
  print(f"The plugin costs {cost:.2f} ms a start; the limit is {LIMIT_MS} ms: {'met' if cost < LIMIT_MS else 'NOT met'}.")
  commands()


if __name__ == "__main__":
  main()
