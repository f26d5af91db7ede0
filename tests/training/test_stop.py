"""MaxText's own trainer, stopped by a signal: what it saves, says and returns, and that the same command goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import stop_runs
from stock_runs import arguments, checkpoint, metrics, write_documents
from stop_runs import a_run, results

from maxtext_ling2.training import checkpoint_report

MODEL = {"base_num_decoder_layers": 3, "scan_layers": False}
STEPS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("stop")


@pytest.fixture(scope="module")
def settings(folder):
  """With an evaluation after each second step, and without any checkpoint of MaxText's own before the end."""
  documents = write_documents(folder)
  evaluation = {"eval_interval": 2, "eval_steps": 2, "grain_eval_files": documents["grain_train_files"]}
  return documents | MODEL | evaluation | {"grain_worker_count_eval": 0, "async_checkpointing": True}


def ended(process):
  """The results of a process of stop_runs.py, which did all its runs."""
  output, _ = process.communicate()
  assert process.returncode == 0, output[-5000:]
  return results(output)


@pytest.fixture(scope="module")
def runs(folder, settings):
  """{name: (exit code, what was printed)}"""
  straight, parts, unsaved = (
    arguments(folder, name, name, STEPS, **settings | more)
    for name, more in (("straight", {}), ("parts", {}), ("unsaved", {"enable_checkpointing": False}))
  )
  names = ("straight", "stopped", "continued", "unsaved")
  process = stop_runs.start(
    folder, a_run(straight), a_run(parts, "SIGTERM", 4), a_run(parts), a_run(unsaved, "SIGINT", 1)
  )
  return dict(zip(names, ended(process), strict=True))


def last_line(printed):
  """What the run said of its end."""
  (line,) = re.findall(r"^maxtext-ling2: stopped by .*$", printed, re.M)
  return line


def records(folder, name):
  """All lines of a metrics file, without times."""
  lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
  timed = ("perf/", "eval/step_time", "run_name")
  return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in lines]


def test_a_stopped_run_saves_and_says_so(runs, folder):
  code, printed = runs["stopped"]
  assert code == 128 + signal.SIGTERM
  where = folder / "parts" / "checkpoints" / "4"
  text = f"maxtext-ling2: stopped by SIGTERM after step 4; checkpoint {where}; the same command goes on from there"
  assert last_line(printed) == text
  assert (where / "items").is_dir() and (where / "iter").is_dir()
  assert "Traceback" not in printed


def test_the_same_command_goes_on_to_the_bit(runs, folder):
  """The metrics file has every line of a run that was not stopped, evaluations too, and the weights are the same."""
  assert [runs[name][0] for name in ("straight", "continued")] == [0, 0]
  straight = records(folder, "straight")
  assert records(folder, "parts") == straight
  assert [line["step"] for line in straight if "learning/loss" in line] == list(range(STEPS))
  assert [line["step"] for line in straight if "eval/total_loss" in line] == [0, 2, 4, 6]
  assert [line["step"] for line in straight if "eval/avg_loss" in line and "eval/total_loss" not in line] == [0, 1] * 4
  straight, parts = (checkpoint(folder, name, STEPS - 1) for name in ("straight", "parts"))
  assert set(straight) == set(parts)
  for path, value in straight.items():
    np.testing.assert_array_equal(parts[path], value, err_msg=path)


def test_without_checkpoints_it_says_that_nothing_was_saved(runs, folder):
  code, printed = runs["unsaved"]
  assert code == 128 + signal.SIGINT
  assert last_line(printed) == (
    "maxtext-ling2: stopped by SIGINT after step 1; nothing was saved: enable_checkpointing=false"
  )
  assert sorted(metrics(folder, "unsaved")) == [0, 1]
  assert "LING2: enable_checkpointing=false: nothing of this run is saved" in printed


def as_in_a_terminal(argv):
  """MaxText's command in a process group of its own."""
  command = [sys.executable, "-m", "maxtext.trainers.pre_train.train", *argv]
  before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
  try:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0)
  finally:
    signal.signal(signal.SIGINT, before)


def wait_for(process, condition):
  deadline = time.monotonic() + 300
  while not condition():
    assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-5000:]
    time.sleep(0.02)


@pytest.fixture(scope="module")
def in_a_terminal(folder, settings):
  """The exit code and output of MaxText's command with a data worker, after Ctrl-C."""
  more = {"grain_worker_count": 1, "eval_interval": -1}
  process = as_in_a_terminal(arguments(folder, "terminal", "terminal", 100_000, **settings | more))
  file = folder / "terminal.jsonl"
  wait_for(process, lambda: file.exists() and file.read_text().count("\n") > 1)
  os.killpg(process.pid, signal.SIGINT)
  output, _ = process.communicate()
  return process.returncode, output


def test_control_c_in_a_terminal(in_a_terminal, folder):
  """The terminal sends the signal to the data worker, too, which must not end before the run has saved."""
  code, output = in_a_terminal
  assert code == 130, output[-5000:]
  last = max(metrics(folder, "terminal"))
  where = folder / "terminal" / "checkpoints" / str(last)
  text = f"maxtext-ling2: stopped by SIGINT after step {last}; checkpoint {where}; the same command goes on from there"
  assert last_line(output) == text
  assert (where / "items").is_dir()
  assert "KeyboardInterrupt" not in output


def test_the_size_said_beforehand_is_that_of_the_arrays(in_a_terminal, folder):
  said = re.search(r"LING2: a checkpoint has (.*?) of arrays; (.*)", in_a_terminal[1])
  size = sum(array.nbytes for array in checkpoint(folder, "terminal", max(metrics(folder, "terminal"))).values())
  assert said[1] == checkpoint_report.readable(size)
  assert said[2] == (
    "one is written every 1000 steps, and one at the end; all are kept (max_num_checkpoints_to_keep is not set): "
    f"100 with {checkpoint_report.readable(100 * size)} at the end; in {folder}/terminal/checkpoints/"
  )
