"""Runs a stock command: its output goes to a log, signals are passed on, its exit code comes back.

The command runs in a session of its own, so a signal of the terminal (Ctrl-C) reaches this process alone. Each signal is
passed on once: the first lets a LING2 trainer end its step and save, the second ends it at once, a third kills it.
"""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_POLL_SECONDS = 0.5
_SIGNALS = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGHUP: signal.SIGTERM}
"""What is passed on for each signal; that the terminal is gone is no more than a reason to end."""


@dataclass(frozen=True)
class Ended:
  """How a command has ended.

  Attributes:
    code: its exit code as a shell gives it: 128 + N if signal N has ended it.
    signals: the signals that came while it ran.
  """

  code: int
  signals: tuple[int, ...] = ()


class _Forwarding:
  """Handler that passes signals on to a process, also those that came before it was started."""

  def __init__(self) -> None:
    self.received: list[int] = []
    self._process: subprocess.Popen[bytes] | None = None

  def __call__(self, number: int, frame: FrameType | None) -> None:
    self.received.append(number)
    self._send(number, len(self.received))

  def to(self, process: subprocess.Popen[bytes]) -> None:
    """Passes signals on to this process from now on."""
    self._process = process
    for count, number in enumerate(self.received, 1):
      self._send(number, count)

  def _send(self, number: int, count: int) -> None:
    if self._process is not None:
      self._process.send_signal(_SIGNALS[signal.Signals(number)] if count <= 2 else signal.SIGKILL)


def run(
  arguments: Sequence[str],
  variables: Mapping[str, str],
  log: Path,
  watch: Callable[[], None],
  stopping: Callable[[], None] = lambda: None,
) -> Ended:
  """Runs a command to its end. It never outlives this call, even after an error here.

  Args:
    arguments: the command.
    variables: environment variables beyond the user's.
    log: file that the command's output is appended to.
    watch: called twice per second while the command runs, and once after its end.
    stopping: called after the first signal.

  Returns:
    How the command has ended.
  """
  with log.open("ab") as output, _handled(_Forwarding()) as forwarding:
    process = subprocess.Popen(
      arguments, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
      start_new_session=True,
    )  # fmt: skip
    forwarding.to(process)
    try:
      _wait(process, watch, stopping, forwarding)
    finally:
      if process.poll() is None:
        process.terminate()
        process.wait()
  watch()
  code = process.returncode
  return Ended(code if code >= 0 else 128 - code, tuple(forwarding.received))


def _wait(
  process: subprocess.Popen[bytes], watch: Callable[[], None], stopping: Callable[[], None], forwarding: _Forwarding
) -> None:
  told = False
  while process.poll() is None:
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(_POLL_SECONDS)
    if forwarding.received and not told:
      told = True
      stopping()
    watch()


@contextlib.contextmanager
def _handled(forwarding: _Forwarding) -> Iterator[_Forwarding]:
  """Handles signals within the context. Those that whoever started us has set to be ignored (nohup) stay ignored."""
  before = {}
  if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only there
    wanted = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forwarding) for number in wanted}
  try:
    yield forwarding
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
