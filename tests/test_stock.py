"""Stock models are the same to the bit with and without the plugin: the same script, in two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maxtext_ling2.configs.fields import DEFAULTS

SCRIPT = Path(__file__).parent / "stock_models.py"


def start(disable):
  environment = {**os.environ, "MAXTEXT_LING2_DISABLE": "1" if disable else "0", "PYTHONPATH": ""}
  command = [sys.executable, str(SCRIPT), ",".join(DEFAULTS)]
  return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def results():
  processes = [start(disable) for disable in (True, False)]
  found = []
  for process in processes:
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-3000:]
    found.append(json.loads(next(line for line in out.splitlines() if line.startswith("RESULT")).removeprefix("RESULT ")))
  return found


def test_one_had_the_plugin_and_one_had_not(results):
  without, with_plugin = results
  assert (without["plugin"], with_plugin["plugin"]) == (False, True)


@pytest.mark.parametrize("name", ["llama2-7b", "deepseek3-tiny", "qwen3-next-80b-a3b"])
@pytest.mark.parametrize("what", ["config", "tree", "logits", "loss", "step", "flops"])
def test_same(results, name, what):
  without, with_plugin = results
  assert without[name]["finite"]
  assert with_plugin[name][what] == without[name][what]
