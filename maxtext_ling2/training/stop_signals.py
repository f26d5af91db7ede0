"""SIGINT and SIGTERM as a request to stop: the first is remembered, a second one ends the process at once.

A thread reads what Python's C handler writes to the wakeup socket. So a signal counts when it comes, also while the main
thread waits for a device: a handler in Python would run only afterwards, and once for any number of signals.
"""

import os
import signal
import socket
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


def exit_code(number: int) -> int:
  """What a shell shows for a process that a signal has ended."""
  return 128 + number


class StopSignals:
  """Takes SIGINT and SIGTERM of this process from `install` to `restore`.

  Processes that are started meanwhile from the main thread do not get SIGINT: the terminal sends it to data workers, too.

  Attributes:
    requested: the signal that came; None: none so far.
  """

  def __init__(self) -> None:
    self.requested: signal.Signals | None = None
    self._handlers: dict[signal.Signals, Any] = {}
    self._mask: set[int] = set()

  def install(self) -> None:
    """Takes the signals that nobody else handles or ignores.

    Takes none in another thread than the main one, to which Python gives signals, or where an event loop reads them.
    """
    if threading.current_thread() is not threading.main_thread():
      return
    from multiprocessing import resource_tracker

    taken = [number for number in SIGNALS if signal.getsignal(number) in _DEFAULTS]
    self._receiver, self._sender = socket.socketpair()
    self._sender.setblocking(False)
    before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
    if before != -1 or not taken:
      signal.set_wakeup_fd(before)
      self._close()
      return
    # It keeps SIGINT unblocked, so that there is always a thread that the system can give the signal to.
    self._watcher = threading.Thread(target=self._watch, name="maxtext-ling2 signals", daemon=True)
    self._watcher.start()
    resource_tracker.ensure_running()  # by workers at the latest; once it has started, it unblocks SIGINT
    self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    self._handlers = {number: signal.signal(number, _wake_up) for number in taken}

  def restore(self) -> None:
    """Gives the signals back. Idempotent."""
    if not self._handlers:
      return
    for number, handler in self._handlers.items():
      signal.signal(number, handler)
    self._handlers = {}
    signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
    signal.set_wakeup_fd(-1)
    self._sender.close()  # the watcher reads the end
    self._watcher.join()
    self._receiver.close()

  def _close(self) -> None:
    self._sender.close()
    self._receiver.close()

  def _watch(self) -> None:
    while received := self._receiver.recv(1):
      number = received[0]
      if number not in SIGNALS:
        continue
      name = signal.Signals(number).name
      if self.requested is not None:
        _say(f"ended at once by a second signal, {name}")
        _kill_children()
        os._exit(exit_code(number))
      self.requested = signal.Signals(number)
      _say(f"{name}: the run stops after this step; a second signal ends it at once")


def _wake_up(number: int, frame: FrameType | None) -> None:
  """Python's part of a handler; what there is to do, the watcher does."""


def _kill_children() -> None:
  """Ends data workers, which would wait for this process forever."""
  import multiprocessing

  for child in multiprocessing.active_children():
    child.kill()


def _say(text: str) -> None:
  os.write(2, f"maxtext-ling2: {text}\n".encode())  # sys.stderr may be locked by what the signal interrupted
