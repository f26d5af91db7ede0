"""Seam: SIGINT and SIGTERM end a training run after its step, with a checkpoint.

MaxText knows one way to be stopped, JAX's preemption service, which exists in runs of several processes: they agree on
a step, after which the loop ends, without a checkpoint unless `enable_autocheckpoint` is set. A run of one process loses
all since its last checkpoint.

Here a run of one process takes both signals while its loop runs. Asked to stop, by a signal or by the service, it saves
after the step, evaluates if an evaluation is due, writes the step's metrics, and then ends as MaxText ends a run, with
another exit code. The loop is `train_loop` of `pre_train.train`, also that of native fine-tuning. It may run as
`__main__`, so its begin and end are seen by the first and the last function that it calls while it handles errors.
"""

import dataclasses
import os
import re
import signal
import sys
from typing import Any

from maxtext_ling2.host.contract import Expectation, expect
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Handlers, Seam, Use
from maxtext_ling2.training.stop_signals import StopSignals, exit_code

_CHECKPOINTING = "maxtext.common.checkpointing"
_LOGGER = "maxtext.common.metric_logger"
_RESUMES_DATA = ("grain", "synthetic")


@dataclasses.dataclass
class _Run:
  """A training loop that is running.

  Attributes:
    signals: which it takes; it takes none in a run of several processes.
    finished: the last step that was computed; None: none so far.
    stopped_after: the step after which it stops; None: nobody asked.
    saved: whether that step has a checkpoint.
  """

  signals: StopSignals
  finished: int | None = None
  stopped_after: int | None = None
  saved: bool = False

  @property
  def signal(self) -> signal.Signals:
    """What stops it; JAX's preemption service reports SIGTERM."""
    return self.signals.requested or signal.SIGTERM


class StopSeam(Seam):
  """Lets a LING2 run that is stopped by a signal save, say so and end."""

  name = "stop"
  module = "maxtext.utils.train_utils"
  use = Use(
    "SIGINT or SIGTERM", lambda config: True, "and SIGINT or SIGTERM ends it without a checkpoint", essential=False
  )
  expectations = (
    *expect(module, "prepare_before_run_start(config)", "maybe_cleanup_dcn_throttling(config)"),
    *expect(
      _CHECKPOINTING,
      "maybe_save_checkpoint(checkpoint_manager, state, config, data_iterator, step)",
      "save_checkpoint(checkpoint_manager, step, state, config, data_iterator, force)",
      "wait_until_finished(checkpoint_manager)",
      "all_steps(checkpoint_manager)",
      "reached_preemption(checkpoint_manager, step)",
    ),
    *expect(_LOGGER, "MetricLogger.buffer_and_write_metrics(metrics, step, is_training)"),
    Expectation("maxtext.utils.exceptions:StopTraining"),
  )

  def __init__(self) -> None:
    super().__init__()
    self._run: _Run | None = None

  def handlers(self) -> Handlers:
    return {"prepare_before_run_start": self._begin, "maybe_cleanup_dcn_throttling": self._end}

  def apply(self) -> None:
    from maxtext.common import checkpointing, metric_logger

    super().apply()
    self.patches.wrap_for_ling2(checkpointing, "maybe_save_checkpoint", self._save)
    self.patches.wrap_for_ling2(metric_logger.MetricLogger, "buffer_and_write_metrics", self._write)

  def _begin(self, call: Call) -> Any:
    import jax

    self._run = _Run(StopSignals())
    if jax.process_count() == 1:
      self._run.signals.install()
    return call.original()

  def _save(self, call: Call) -> Any:
    """Saves after a step also where MaxText would not: between two checkpoints, and after step 0."""
    from maxtext.common import checkpointing

    run, config, manager, step = self._run, call.config, call["checkpoint_manager"], call.get("step", None)
    if run is None or step is None:
      return call.original()
    run.finished = int(step)
    if step + 1 >= config.steps or not _is_asked(run, manager, step):
      return call.original()  # behind the last step MaxText ends, and saves, by itself
    run.stopped_after = run.finished
    if manager is None:
      return None
    checkpointing.wait_until_finished(manager)
    if run.stopped_after not in checkpointing.all_steps(manager):
      checkpointing.save_checkpoint(manager, run.stopped_after, call["state"], config, call["data_iterator"], force=True)
      checkpointing.wait_until_finished(manager)
    run.saved = True
    return None

  def _write(self, call: Call) -> Any:
    from maxtext.utils import exceptions

    result, run = call.original(), self._run
    if run is not None and run.stopped_after is not None and call.get("is_training", True):
      raise exceptions.StopTraining(f"{run.signal.name} after step {run.finished}.")
    return result

  def _end(self, call: Call) -> Any:
    result, run, self._run = call.original(), self._run, None
    if run is None:
      return result
    run.signals.restore()
    failed = sys.exc_info()[0] is not None  # MaxText's function is called whatever happened; an error says more
    if failed or not _was_cut_short(run, call.config):
      return result
    print(_last_line(call.config, run), file=sys.stderr, flush=True)
    raise SystemExit(exit_code(run.signal))


def _is_asked(run: _Run, manager: Any, step: Any) -> bool:
  """Whether the run has to stop after this step; in a run of several processes all get the same answer."""
  from maxtext.common import checkpointing

  if run.signals.requested is not None:
    return True
  return manager is not None and checkpointing.reached_preemption(manager, step)


def _was_cut_short(run: _Run, config: Any) -> bool:
  """Whether a signal came and steps are missing: the run stopped for it, or the signal has ended a data worker, too."""
  if run.stopped_after is not None:
    return True
  return run.signals.requested is not None and (run.finished is None or run.finished + 1 < config.steps)


def _last_line(config: Any, run: _Run) -> str:
  """What stopped the run, where its checkpoint is, and how it goes on; the begin is fixed, programs look for it."""
  where = "before the first step" if run.finished is None else f"after step {run.finished}"
  text = f"maxtext-ling2: stopped by {run.signal.name} {where}"
  if run.stopped_after is None:
    return f"{text}; nothing was saved: there was no data for the next step"
  if not run.saved:
    return f"{text}; nothing was saved: enable_checkpointing=false"
  checkpoint = os.path.join(config.checkpoint_dir, str(run.finished))
  text += f"; checkpoint {checkpoint}; the same command {_name_to_add(config)}goes on from there"
  if config.dataset_type in _RESUMES_DATA:
    return text
  return f"{text}, but with the data from its beginning: dataset_type={config.dataset_type} keeps no position"


def _name_to_add(config: Any) -> str:
  """Which setting the command lacks: MaxText names a run that has no name by the minute, and finds it by that name."""
  made = re.fullmatch(rf"{re.escape(config.model_name)}_\d{{4}}(-\d\d){{4}}", config.run_name)
  return f"with run_name={config.run_name} " if made else ""
