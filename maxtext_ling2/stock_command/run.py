"""A training run: its files, and the run itself, followed to its end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from maxtext_ling2.stock_command import process
from maxtext_ling2.stock_command.log import Log
from maxtext_ling2.stock_command.metrics import MetricsFile
from maxtext_ling2.stock_command.process import Ended
from maxtext_ling2.stock_command.progress import STARTING, Shown, Training

STOPPING = "stopping: the step ends and a checkpoint is saved, if training has begun; again to end at once"


@dataclass(frozen=True)
class Run:
  """Files of one training run; the layout of `checkpoints` is MaxText's.

  Attributes:
    folder: absolute path of log and plot: base_output_directory/run_name, where that is a local folder.
    steps: training steps.
    metrics: MaxText's metrics_file.
    output: base_output_directory/run_name as MaxText is told, which may be a bucket.
  """

  folder: Path
  steps: int
  metrics: Path
  output: str

  @property
  def log(self) -> Path:
    """Output of the trainer."""
    return self.folder / "train.log"

  @property
  def plot(self) -> Path:
    """The loss curve."""
    return self.folder / "loss.png"

  @property
  def checkpoints(self) -> str:
    """The folder of all checkpoints."""
    return f"{self.output}/checkpoints"

  def last_checkpoint(self) -> Path | None:
    """The last complete checkpoint in a local folder; None if there is none, or if it is a bucket."""
    folder = Path(self.checkpoints)
    steps = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return max(steps, key=lambda path: int(path.name), default=None)


@dataclass(frozen=True)
class Outcome:
  """What a trainer has left behind.

  Attributes:
    ended: how it has ended.
    metrics: its metrics_file.
    log: its log.
  """

  ended: Ended
  metrics: MetricsFile
  log: Log


def follow(arguments: Sequence[str], variables: Mapping[str, str], run: Run, console: Console) -> Outcome:
  """Runs a trainer to its end and shows its progress; signals are passed on to it, see `process`.

  Args:
    arguments: the command.
    variables: environment variables beyond the user's.
    run: its files; the folder exists.
    console: where progress is shown.
  """
  metrics, log = MetricsFile(run.metrics), Log(run.log)
  with Shown(console, STARTING, "step") as shown:
    training = Training(shown, metrics, log, run.steps)
    ended = process.run(arguments, variables, run.log, training.watch, lambda: shown.say(STOPPING))
  return Outcome(ended, metrics, log)
