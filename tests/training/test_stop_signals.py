"""SIGINT and SIGTERM as a request, in small processes of their own that get real signals."""

import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

PREPARE = """
import multiprocessing, os, signal, subprocess, sys, threading, time
from maxtext_ling2.training.stop_signals import StopSignals
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
signals = StopSignals()

def state():
  handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
  return handlers, signal.pthread_sigmask(signal.SIG_BLOCK, [])
"""


def output(code):
  """(exit code, standard output, what was said) of a process that runs this."""
  done = subprocess.run([sys.executable, "-c", PREPARE + code], capture_output=True, text=True, check=False, timeout=60)
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_first_is_remembered(name):
  code = f"""
before = state()
signals.install()
os.kill(os.getpid(), signal.{name})
while signals.requested is None:
  time.sleep(0.01)
signals.restore()
assert state() == before and signal.set_wakeup_fd(-1) == -1
signals.restore()
print(signals.requested.name, threading.active_count())
"""
  said = f"maxtext-ling2: {name}: the run stops after this step; a second signal ends it at once\n"
  assert output(code) == (0, f"{name} 1\n", said)


@pytest.mark.parametrize(("first", "second"), [("SIGINT", "SIGINT"), ("SIGINT", "SIGTERM"), ("SIGTERM", "SIGINT")])
def test_a_second_ends_the_process_at_once_and_its_workers(first, second):
  """While the main thread is in C, where Python would handle neither."""
  code = f"""
import ctypes
signals.install()
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,), daemon=True)
worker.start()
send = "import os, signal, time; time.sleep({{}}); os.kill({{}}, signal.{{}})"
for seconds, name in ((0.2, "{first}"), (0.6, "{second}")):
  subprocess.Popen([sys.executable, "-S", "-c", send.format(seconds, os.getpid(), name)])
while True:
  ctypes.CDLL(None).poll(None, 0, 30_000)
"""
  number, _, said = output(code)  # which has an end when the worker, too, has gone
  assert number == 128 + getattr(signal, second)
  assert said.splitlines() == [
    f"maxtext-ling2: {first}: the run stops after this step; a second signal ends it at once",
    f"maxtext-ling2: ended at once by a second signal, {second}",
  ]


def test_children_do_not_get_what_the_terminal_sends():
  """With the start method of grain's workers; it starts a process that unblocks SIGINT, once."""
  code = """
signals.install()
context = multiprocessing.get_context("spawn")
queue = context.Queue()
code = "import signal, sys; sys.exit(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
worker = context.Process(target=exec, args=(code,))
worker.start()
worker.join()
signals.restore()
print(worker.exitcode)
"""
  assert output(code)[:2] == (0, "1\n")


def test_what_others_handle_is_theirs():
  code = """
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a shell's background jobs
signals.install()
os.kill(os.getpid(), signal.SIGINT)
print(signal.getsignal(signal.SIGINT).name, signals.requested)
signals.restore()
signal.signal(signal.SIGTERM, handler := lambda *_: None)
signals.install()
print(signal.getsignal(signal.SIGTERM) is handler, signal.set_wakeup_fd(-1))
"""
  assert output(code) == (0, "SIG_IGN None\nTrue -1\n", "")


def test_an_event_loop_keeps_its_signals():
  code = """
import socket
mine, _other = socket.socketpair()
mine.setblocking(False)
signal.set_wakeup_fd(mine.fileno())
before = state()
signals.install()
print(state() == before, signal.set_wakeup_fd(-1) == mine.fileno())
"""
  assert output(code) == (0, "True True\n", "")


def test_nothing_is_taken_in_another_thread():
  code = """
before = state()
thread = threading.Thread(target=signals.install)
thread.start()
thread.join()
print(state() == before, signal.set_wakeup_fd(-1))
"""
  assert output(code) == (0, "True -1\n", "")


INTERRUPT = """
import types
from maxtext_ling2.host.interrupt import say_in_one_line
sys.excepthook = lambda kind, error, traceback: print(f"before: {error}")
config = types.SimpleNamespace(enable_checkpointing=%s, checkpoint_dir="/runs/a/checkpoints/")
say_in_one_line(config)
say_in_one_line(config)
raise %s
"""


def test_an_interrupt_is_one_line():
  said = "maxtext-ling2: ended by SIGINT without a checkpoint"
  where = "; earlier ones of this run, if any, are in /runs/a/checkpoints/"
  assert output(INTERRUPT % (True, "KeyboardInterrupt")) == (130, "", f"{said}{where}\n")
  assert output(INTERRUPT % (False, "KeyboardInterrupt")) == (130, "", f"{said}\n")


def test_other_errors_are_shown_as_before():
  assert output(INTERRUPT % (True, "ValueError(3)")) == (1, "before: 3\n", "")
