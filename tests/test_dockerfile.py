"""The Dockerfile without Docker: what it copies is there, it installs as the install page says, its commands run."""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import typer

from maxtext_ling2 import cli
from sandbox import ROOT
from test_packaging import BUILT_FROM, PROJECT

TEXT = (ROOT / "Dockerfile").read_text()
STEPS = [line.split(maxsplit=1) for line in TEXT.splitlines() if line and not line.startswith("#")]
SOURCE = "/src"


def arguments(instruction: str) -> list[str]:
  """What stands after each instruction of a kind."""
  return [rest for name, rest in STEPS if name == instruction]


@pytest.mark.unit
def test_it_knows_no_instruction_that_these_tests_do_not() -> None:
  assert {name for name, _ in STEPS} == {"FROM", "COPY", "RUN", "WORKDIR", "ENTRYPOINT", "CMD"}
  (image,) = arguments("FROM")
  assert re.fullmatch(r"python:3\.\d+-slim", image)
  assert f"Programming Language :: Python :: {image[len('python:') : -len('-slim')]}" in PROJECT["classifiers"]


@pytest.mark.unit
def test_it_copies_what_the_package_is_built_from_and_docker_is_sent_no_more() -> None:
  copied = [source for line in arguments("COPY") for source in line.split()[:-1]]
  assert set(copied) == {name for name in BUILT_FROM if name != ".gitignore"}
  sent = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
  assert sent == copied


@pytest.mark.unit
def test_it_installs_by_the_line_of_the_page() -> None:
  install = arguments("RUN")[0]
  page = (ROOT / "docs" / "install.md").read_text()
  in_checkout = install.replace(f"{SOURCE}/maxtext_ling2", "maxtext_ling2").replace(f"'{SOURCE}[", "-e '.[")
  assert in_checkout == "pip install -c maxtext_ling2/constraints.txt -e '.[tpu]'" and in_checkout in page


@pytest.mark.unit
def test_it_starts_a_command_that_exists() -> None:
  (entry,), (command,) = arguments("ENTRYPOINT"), arguments("CMD")
  assert entry == '["maxtext-ling2"]' and PROJECT["scripts"]["maxtext-ling2"] == "maxtext_ling2.cli:main"
  assert command == '["doctor"]' and "doctor" in typer.main.get_command(cli.app).commands


@pytest.mark.slow
def test_its_commands_run_in_an_empty_environment(tmp_path: Path) -> None:
  """COPY and RUN as Docker would, with a folder of the test for /src; uv, which is quicker, for pip where it is there."""
  source, environment = tmp_path / "src", tmp_path / "venv"
  ignored = shutil.ignore_patterns("__pycache__")
  for line in arguments("COPY"):
    *names, target = line.split()
    place = Path(target.replace(SOURCE, str(source)))
    for name in names:
      assert not fnmatch.fnmatch(name, "*[*?]*")
      if (ROOT / name).is_dir():
        shutil.copytree(ROOT / name, place, ignore=ignored)
      else:
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place)
  uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
  venv.create(environment, with_pip=uv is None)
  path = environment / "bin"
  if uv:
    (path / "pip").write_text(f'#!/bin/sh\nexec {shlex.quote(uv)} pip "$@" --python {path / "python"}\n')
    (path / "pip").chmod(0o755)
  clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
  for command in arguments("RUN"):
    done = subprocess.run(
      command.replace(SOURCE, str(source)), shell=True, cwd=tmp_path, env=clean | {"PATH": f"{path}:{os.defpath}"},
      capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
  assert "A LING2 run would work." in done.stdout
