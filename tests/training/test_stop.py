"""MaxText's own trainer, stopped by a signal: what it saves, says and returns, and that the same command goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import stop_runs
from stock_runs import arguments, checkpoint, metrics, write_documents
from stop_runs import a_run, results

from maxtext_ling2.host.seams import stop
from maxtext_ling2.training import checkpoint_report
from maxtext_ling2.training.stop_signals import StopSignals

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
  straight, parts = (arguments(folder, name, name, STEPS, **settings) for name in ("straight", "parts"))
  process = stop_runs.start(folder, a_run(straight), a_run(parts, "SIGTERM", 4), a_run(parts))
  return dict(zip(("straight", "stopped", "continued"), ended(process), strict=True))


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


@pytest.mark.slow
def test_without_checkpoints_it_says_that_nothing_was_saved(folder, settings):
  argv = arguments(folder, "unsaved", "unsaved", STEPS, **settings | {"enable_checkpointing": False})
  ((code, printed),) = ended(stop_runs.start(folder, a_run(argv, "SIGINT", 1)))
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


@pytest.mark.slow
def test_control_c_before_the_first_step_is_one_line(folder, settings):
  process = as_in_a_terminal(arguments(folder, "early", "early", 100_000, **settings))
  for line in process.stdout:
    if "LING2: a checkpoint has" in line:  # the step is compiled next
      break
  os.killpg(process.pid, signal.SIGINT)
  output, _ = process.communicate()
  assert process.returncode == 130, output[-5000:]
  where = f"earlier ones of this run, if any, are in {folder}/early/checkpoints/"
  assert f"maxtext-ling2: ended by SIGINT without a checkpoint; {where}\n" in output
  assert "Traceback" not in output


@pytest.mark.slow
def test_step_0_is_saved_too(runs, folder, settings):
  """MaxText saves nothing there; its own checkpoints begin with save_checkpoint_on_start, or at the end."""
  argv = arguments(folder, "first", "first", STEPS, **settings)
  (stopped, printed), (continued, _) = ended(stop_runs.start(folder, a_run(argv, "SIGINT", 0), a_run(argv)))
  assert (stopped, continued) == (130, 0)
  assert f"after step 0; checkpoint {folder}/first/checkpoints/0; the same" in last_line(printed)
  assert records(folder, "first") == records(folder, "straight")


@pytest.mark.slow
def test_a_multiple_of_the_period_and_the_last_step(folder, settings):
  """The first is saved once; in the last step there is nothing to stop, and MaxText saves by itself."""
  argv = arguments(folder, "often", "often", 5, **settings | {"checkpoint_period": 2})
  process = stop_runs.start(
    folder, a_run(argv, "SIGTERM", 2), a_run(argv, "SIGTERM", 1, no_data=True), a_run(argv, "SIGINT", 1)
  )
  (stopped, printed), (without_data, nothing), (completed, output) = ended(process)
  assert (stopped, without_data, completed) == (143, 143, 0)
  assert f"after step 2; checkpoint {folder}/often/checkpoints/2; the same" in last_line(printed)
  assert last_line(nothing) == (
    "maxtext-ling2: stopped by SIGTERM after step 3; nothing was saved: there was no data for the next step"
  )
  assert "maxtext-ling2: SIGINT: the run stops after this step" in output and "stopped by" not in output
  assert sorted(int(path.name) for path in (folder / "often" / "checkpoints").iterdir()) == [2, 4]


@pytest.mark.slow
def test_native_fine_tuning_stops_and_goes_on(folder):
  module, settings = "maxtext.trainers.post_train.sft.train_sft_native", {"dataset_type": "synthetic", **MODEL}
  argv = arguments(folder, "tuned", "tuned", STEPS, **settings)
  whole = [module, *arguments(folder, "whole", "whole", STEPS, **settings)]
  process = stop_runs.start(folder, a_run([module, *argv], "SIGINT", 3), a_run([module, *argv]), a_run(whole))
  (stopped, printed), (continued, _), (straight, _) = ended(process)
  assert (stopped, continued, straight) == (130, 0, 0)
  assert f"after step 3; checkpoint {folder}/tuned/checkpoints/3; the same command goes on" in last_line(printed)
  assert metrics(folder, "tuned") == metrics(folder, "whole")


RUN = {
  "run_name": "a",
  "model_name": "ling2-tiny",
  "checkpoint_dir": "/runs/a/checkpoints/",
  "dataset_type": "grain",
}
BEGIN = "maxtext-ling2: stopped by SIGTERM after step 7; checkpoint /runs/a/checkpoints/7; the same command"


@pytest.mark.parametrize(
  ("changes", "text"),
  [
    ({}, "goes on from there"),
    ({"run_name": "ling2-tiny_2026-11-27-03-12"}, "with run_name=ling2-tiny_2026-11-27-03-12 goes on from there"),
    (
      {"dataset_type": "hf"},
      "goes on from there, but with the data from its beginning: dataset_type=hf keeps no position",
    ),
  ],
)
def test_how_to_go_on(changes, text):
  run = stop._Run(StopSignals(), finished=7, stopped_after=7, saved=True)
  assert stop._last_line(types.SimpleNamespace(**RUN | changes), run) == f"{BEGIN} {text}"
