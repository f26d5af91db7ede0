"""Runs of MaxText's own trainer in one process, which sends itself a signal within a step.

As a script: `python stop_runs.py FILE` with a JSON list of `a_run`. The signal comes while the data of that step is
loaded. After each run its exit code is printed.
"""

import json
import os
import signal
import sys
from pathlib import Path

from stock_runs import start as start_script

ENDED = "=== a run ended with "


def start(folder, *runs):
  """Starts the process that does these runs, of `a_run`."""
  return start_script(folder, *runs, script=__file__)


def a_run(argv, name=None, step=None, no_data=False):
  """The command line of a run, which signal comes in which of its steps, and whether there are no data from then on."""
  return {"argv": argv, "signal": name, "step": step, "no_data": no_data}


def results(output):
  """[(exit code, what was printed)] by run."""
  *parts, _ = output.split(ENDED)
  codes = [int(part.partition("\n")[0]) for part in output.split(ENDED)[1:]]
  return list(zip(codes, parts, strict=True))


def _send_within(name, step, no_data):
  """Lets this process send itself a signal as it loads the data of one step; returns what takes that back."""
  from maxtext.common.data_loader import DataLoader

  original, loaded = DataLoader.load_next_batch, []

  def load_next_batch(self, *args, **kwargs):
    if len(loaded) == step:
      os.kill(os.getpid(), signal.Signals[name])
      if no_data:
        self.data_iterator = iter(())
    loaded.append(None)
    return original(self, *args, **kwargs)

  DataLoader.load_next_batch = load_next_batch
  return lambda: setattr(DataLoader, "load_next_batch", original)


def _assert_signals_are_free():
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
  assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
  before = signal.set_wakeup_fd(-1)
  assert before == -1


def _main(runs):
  import importlib

  from absl import flags

  flags.FLAGS([sys.argv[0]])  # as app.run does: grain reads flags
  for run in runs:
    module, *words = (
      run["argv"] if run["argv"][0].startswith("maxtext.") else ["maxtext.trainers.pre_train.train", *run["argv"]]
    )
    trainer, code = importlib.import_module(module), 0
    take_back = _send_within(run["signal"], run["step"], run["no_data"]) if run["signal"] else lambda: None
    try:
      trainer.main(["train", *words])
    except SystemExit as end:
      code = end.code
    take_back()
    _assert_signals_are_free()
    sys.stderr.flush()
    print(f"{ENDED}{code}", flush=True)


if __name__ == "__main__":
  signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
  _main(json.loads(Path(sys.argv[1]).read_text()))
