"""The start-up with the MaxText that is installed; test_environment.py and test_startup.py have a stand-in for it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import maxtext
import pytest

from sandbox import ROOT

pytestmark = pytest.mark.hostile

SCRIPT = Path(__file__).parent / "real_config.py"
SITE = Path(maxtext.__file__).parents[1]
ENVIRONMENT = {"PATH": os.defpath, "JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"}  # no HOME in it


def run(folder, *arguments, **variables):
  command = [sys.executable, *map(str, arguments)]
  environment = ENVIRONMENT | {name: str(value) for name, value in variables.items()}
  return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


def config(done):
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
  "worker",
  [
    pytest.param([], id="no worker", marks=pytest.mark.slow),
    pytest.param(["spawn"], id="spawn"),
    pytest.param(["fork"], id="fork", marks=pytest.mark.slow),
  ],
)
def test_without_a_home(tmp_path, worker):
  assert config(run(tmp_path, SCRIPT, *worker)) == ["ling2-tiny", "ling2", 0, "pth"]


def test_without_site(tmp_path):
  done = run(tmp_path, "-S", "-m", "maxtext_ling2", "run", SCRIPT.stem, PYTHONPATH=f"{ROOT}:{SITE}:{SCRIPT.parent}")
  assert config(done) == ["ling2-tiny", "ling2", 0, "import"]


def test_without_the_plugin_nobody_trains_another_model(tmp_path):
  """After the warning of test_environment.py MaxText is as it is without us, and knows no model of that name."""
  shutil.copytree(ROOT / "maxtext_ling2", tmp_path / "maxtext_ling2", ignore=shutil.ignore_patterns("__pycache__"))
  (tmp_path / "maxtext_ling2" / "plugin.py").unlink()
  done = run(tmp_path, SCRIPT, PYTHONPATH=tmp_path)
  assert (done.returncode, done.stdout.count("ling2-tiny")) == (1, 0)
  assert done.stderr.count("ModuleNotFoundError: No module named 'maxtext_ling2.plugin'. MaxText goes on") == 1
  assert "ValidationError: 1 validation error for MaxTextConfig\nmodel_name\n" in done.stderr
  assert "input_value='ling2-tiny'" in done.stderr
