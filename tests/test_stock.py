"""Stock models are the same to the bit with and without the plugin: the same script, in two processes."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maxtext_ling2.configs.fields import DEFAULTS

SCRIPT = Path(__file__).parent / "stock_models.py"


MODELS = ("llama2-7b", "deepseek3-tiny", pytest.param("qwen3-next-80b-a3b", marks=pytest.mark.slow))


def start(disable, names):
  environment = {**os.environ, "MAXTEXT_LING2_DISABLE": "1" if disable else "0", "PYTHONPATH": ""}
  command = [sys.executable, str(SCRIPT), ",".join(DEFAULTS), *names]
  return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def results():
  """A function: name of a model -> what it is without and with the plugin; computed when first asked for."""

  @functools.cache
  def both(names):
    processes = [start(disable, names) for disable in (True, False)]
    found = []
    for process in processes:
      out, err = process.communicate(timeout=900)
      assert process.returncode == 0, err[-3000:]
      found.append(
        json.loads(next(line for line in out.splitlines() if line.startswith("RESULT")).removeprefix("RESULT "))
      )
    return found

  return lambda name: both(MODELS[:2] if name in MODELS[:2] else (name,))


def test_one_had_the_plugin_and_one_had_not(results):
  without, with_plugin = results(MODELS[0])
  assert (without["plugin"], with_plugin["plugin"]) == (False, True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("what", ["config", "tree", "logits", "loss", "step", "flops"])
def test_same(results, name, what):
  without, with_plugin = results(name)
  assert without[name]["finite"]
  assert with_plugin[name][what] == without[name][what]
