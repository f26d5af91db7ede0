"""Ctrl-C outside of a training loop, for instance while a step compiles: one line in place of hundreds of traceback."""

import sys
import threading
from types import TracebackType
from typing import Any

from maxtext_ling2.training.stop_signals import SIGNALS, exit_code


class _OneLine:
  """An excepthook that says in one line where the checkpoints of an interrupted run are; other errors it passes on."""

  def __init__(self, config: Any):
    self._before = sys.excepthook
    self._config = config

  def __call__(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
      self._before(kind, error, traceback)
      return
    folder = self._config.checkpoint_dir if self._config.enable_checkpointing else None
    earlier = f"; earlier ones of this run, if any, are in {folder}" if folder else ""
    print(f"maxtext-ling2: ended by {SIGNALS[0].name} without a checkpoint{earlier}", file=sys.stderr)
    raise SystemExit(exit_code(SIGNALS[0]))


def say_in_one_line(config: Any) -> None:
  """Lets a KeyboardInterrupt that ends this process be one line and exit code 130. Idempotent.

  Args:
    config: MaxText config of the LING2 run that a trainer begins; it may still lack what MaxText derives.
  """
  if threading.current_thread() is threading.main_thread() and not isinstance(sys.excepthook, _OneLine):
    sys.excepthook = _OneLine(config)
