"""How a stock command is run: signals reach it once, its exit code and output come back. The commands are stand-ins."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from maxtext_ling2.stock_command import process

pytestmark = pytest.mark.unit

PATIENCE = 120  # seconds

TRAINER = """
import pathlib, signal, sys, time
mark, received = pathlib.Path(sys.argv[1]), []
def stop(number, frame):
  received.append(signal.Signals(number).name)
  if len(received) == 2:
    sys.exit(7)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
mark.write_text("ready")
while not received:
  time.sleep(0.01)
print("stopping", flush=True)
mark.write_text("stopping")
time.sleep(float(sys.argv[2]))  # the step ends, a checkpoint is saved
print("got", *received, flush=True)
sys.exit(130 if received == ["SIGINT"] else 143)
"""
"""Saves for some seconds after the first signal, ends with 7 at the second."""

WRAPPER = """
import pathlib, sys
from maxtext_ling2.stock_command import process
folder, seconds = pathlib.Path(sys.argv[1]), sys.argv[3]
trainer = [sys.executable, "-c", sys.argv[2], str(folder / "mark"), seconds]
ended = process.run(trainer, {}, folder / "log", lambda: None, lambda: print("stopping shown", flush=True))
print(ended.signals)
sys.exit(ended.code)
"""


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal() -> Iterator[None]:
  """A shell starts its background jobs with SIGINT ignored; a library in the process of the tests may block SIGTERM."""
  numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
  ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]
  for number in ignored:
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
  mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
  yield
  signal.pthread_sigmask(signal.SIG_SETMASK, mask)
  for number in ignored:
    signal.signal(number, signal.SIG_IGN)


def wait_for(mark: Path, text: str) -> None:
  deadline = time.monotonic() + PATIENCE
  while not (mark.is_file() and mark.read_text() == text):
    assert time.monotonic() < deadline
    time.sleep(0.01)


def start(folder: Path, seconds: float, trainer: str = TRAINER) -> "subprocess.Popen[str]":
  """A process that runs the stand-in, in a process group of its own, as a shell starts it in a terminal."""
  command = [sys.executable, "-c", WRAPPER, str(folder), trainer, str(seconds)]
  return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)


def test_ctrl_c_of_a_terminal_arrives_once_and_the_trainer_saves(tmp_path: Path) -> None:
  wrapper = start(tmp_path, 1.5)
  wait_for(tmp_path / "mark", "ready")
  os.killpg(wrapper.pid, signal.SIGINT)  # the terminal's way: to all of the foreground process group
  out, _ = wrapper.communicate(timeout=PATIENCE)
  assert (tmp_path / "log").read_text() == "stopping\ngot SIGINT\n"
  assert out == f"stopping shown\n{(int(signal.SIGINT),)}\n"
  assert wrapper.returncode == 130


@pytest.mark.parametrize(
  ("number", "passed_on", "code"),
  [(signal.SIGINT, "SIGINT", 130), (signal.SIGTERM, "SIGTERM", 143), (signal.SIGHUP, "SIGTERM", 143)],
)
def test_a_signal_to_this_process_alone_is_passed_on(
  tmp_path: Path, number: signal.Signals, passed_on: str, code: int
) -> None:
  wrapper = start(tmp_path, 0)
  wait_for(tmp_path / "mark", "ready")
  wrapper.send_signal(number)
  wrapper.communicate(timeout=PATIENCE)
  assert (tmp_path / "log").read_text() == f"stopping\ngot {passed_on}\n"
  assert wrapper.returncode == code


def test_a_second_signal_is_passed_on_too(tmp_path: Path) -> None:
  wrapper = start(tmp_path, 600)
  wait_for(tmp_path / "mark", "ready")
  wrapper.send_signal(signal.SIGINT)
  wait_for(tmp_path / "mark", "stopping")
  wrapper.send_signal(signal.SIGINT)
  wrapper.communicate(timeout=PATIENCE)
  assert (tmp_path / "log").read_text() == "stopping\n"
  assert wrapper.returncode == 7


def test_a_third_signal_kills(tmp_path: Path) -> None:
  deaf = TRAINER.replace("sys.exit(7)", "mark.write_text('deaf')")
  wrapper = start(tmp_path, 600, deaf)
  for state in ("ready", "stopping", "deaf"):
    wait_for(tmp_path / "mark", state)
    wrapper.send_signal(signal.SIGINT)
  wrapper.communicate(timeout=PATIENCE)
  assert wrapper.returncode == 128 + signal.SIGKILL


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
  """As below nohup: a terminal that goes away does not end the run."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    wrapper = start(tmp_path, 0)
  finally:
    signal.signal(signal.SIGHUP, before)
  wait_for(tmp_path / "mark", "ready")
  wrapper.send_signal(signal.SIGHUP)
  wrapper.send_signal(signal.SIGTERM)
  out, _ = wrapper.communicate(timeout=PATIENCE)
  assert out == f"stopping shown\n{(int(signal.SIGTERM),)}\n"


def test_output_is_appended_and_the_exit_code_comes_back(tmp_path: Path) -> None:
  log, calls = tmp_path / "log", []
  log.write_text("of a former run\n")
  code = "import os, sys; print(os.environ['ASKED']); print('error', file=sys.stderr); sys.exit(5)"
  ended = process.run([sys.executable, "-u", "-c", code], {"ASKED": "yes"}, log, lambda: calls.append(log.read_text()))
  assert (ended.code, ended.signals) == (5, ())
  assert calls[-1] == log.read_text() == "of a former run\nyes\nerror\n"


def test_a_command_that_a_signal_ends_has_the_exit_code_of_a_shell(tmp_path: Path) -> None:
  code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
  assert process.run([sys.executable, "-c", code], {}, tmp_path / "log", lambda: None).code == 137


def test_an_error_here_ends_the_command(tmp_path: Path) -> None:
  def fail() -> None:
    wait_for(tmp_path / "mark", "ready")
    raise BrokenPipeError

  trainer = [sys.executable, "-c", TRAINER, str(tmp_path / "mark"), "0"]
  with pytest.raises(BrokenPipeError):
    process.run(trainer, {}, tmp_path / "log", fail)
  assert (tmp_path / "log").read_text() == "stopping\ngot SIGTERM\n"


def test_another_thread_has_no_handlers(tmp_path: Path) -> None:
  ended = []
  command = [sys.executable, "-c", "print('done')"]
  thread = threading.Thread(target=lambda: ended.append(process.run(command, {}, tmp_path / "log", lambda: None)))
  thread.start()
  thread.join()
  assert (ended[0].code, (tmp_path / "log").read_text()) == (0, "done\n")
