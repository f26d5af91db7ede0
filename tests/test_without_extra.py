"""An environment with what `pip install maxtext-ling2` alone brings: no extra, hence no JAX and no NumPy."""

import importlib.metadata
import re
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
import typer

from maxtext_ling2 import cli
from maxtext_ling2.errors import INSTALL

LINES = {
  "config": "config hf",
  "verify": "verify hf --reference ref.npz",
  "batch": "batch my.yml",
  "generate": "generate step --prompt a",
  "eval": "eval step --text file",
  "plan": "plan ling2 --topology v6e-8",
  "demo": "demo --output out",
  "train": "train model_name=ling2-tiny",
  "sft": "sft model_name=ling2-tiny",
  "convert": "convert hf out",
  "export": "export step out model_name=ling2",
  "run": "run maxtext.trainers.pre_train.train my.yml model_name=ling2",
}
WITHOUT_NEED = {"doctor", "recipe"}
"""They work: one says what is missing, the other prints the path of a file."""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
  """The interpreter of an environment with links to the distributions that ours requires without an extra."""
  folder = tmp_path_factory.mktemp("bare") / "venv"
  venv.create(folder, symlinks=True)
  site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
  waiting, known = ["maxtext-ling2"], set()
  while waiting:
    name = waiting.pop()
    if name in known:
      continue
    known.add(name)
    found = importlib.metadata.distribution(name)
    for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
      if not (site / top).exists():
        (site / top).symlink_to(Path(str(found.locate_file(top))))
    waiting += [re.match(r"[\w.-]+", one)[0] for one in found.requires or [] if "extra ==" not in one]
  assert "maxtext" in known and not {"jax", "numpy"} & known
  return folder / "bin" / "python"


def run(python, folder, line):
  environ = {"PATH": "", "HOME": str(folder)}
  command = [python, "-m", "maxtext_ling2", *line.split()]
  return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60)


def test_every_command_is_tried():
  assert LINES.keys() | WITHOUT_NEED == {*typer.main.get_command(cli.app).commands}


@pytest.mark.parametrize("command", LINES)
def test_one_line_with_the_command_that_helps(python, tmp_path, command):
  done = run(python, tmp_path, LINES[command])
  assert done.returncode == 1
  *said, error = done.stderr.splitlines()
  begun = [line.partition(": ")[0] for line in [*done.stdout.splitlines(), *said]]
  assert begun in ([], ["loading JAX and MaxText ..."], [f"maxtext-ling2 {command}"])
  missing = "absl" if command == "run" else "numpy"
  assert error == f"error: No module named '{missing}', which MaxText needs; run: {INSTALL}"
  assert list(tmp_path.iterdir()) == []


def test_doctor_names_the_extra(python, tmp_path):
  done = run(python, tmp_path, "doctor")
  assert done.returncode == 1
  assert "MaxText does not import: No module named 'jax'" in done.stdout
  assert "pip install 'maxtext-ling2[tpu]' (also right for CPUs; [cuda12] for NVIDIA GPUs)" in done.stdout


def test_what_needs_no_extra_works(python, tmp_path):
  done = run(python, tmp_path, "recipe ling2-v6e-64")
  assert (done.returncode, done.stderr) == (0, "") and Path(done.stdout.strip()).is_file()
  assert run(python, tmp_path, "--version").stdout.startswith("maxtext-ling2 ")


def test_a_module_of_the_users_keeps_its_own_error(python, tmp_path):
  """Where it is this package that is incomplete, or the user's, no extra helps."""
  (tmp_path / "mine.py").write_text("import maxtext_ling2.nowhere\n")
  done = run(python, tmp_path, "run mine")
  assert done.returncode == 1 and done.stderr.endswith("ModuleNotFoundError: No module named 'maxtext_ling2.nowhere'\n")
