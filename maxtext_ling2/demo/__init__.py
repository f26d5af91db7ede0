"""The demo: unmodified MaxText trains LING2 on real English text, with the documented command.

CPython's documentation becomes a Megatron data set (data.py), MaxText's trainer runs on it in a separate process
(train.py), its metrics become a loss curve, and the model writes a paragraph (sample.py). `maxtext_ling2.stock_command`
runs, follows and plots.
"""

import statistics
import sys
from pathlib import Path

from rich.console import Console

from maxtext_ling2 import terminal
from maxtext_ling2.checkpoint.hf_config import MTP_LOSS_SCALING_FACTOR
from maxtext_ling2.demo import data, sample, train
from maxtext_ling2.demo.errors import DemoError
from maxtext_ling2.errors import Ling2Error, describe
from maxtext_ling2.stock_command import plot, shell
from maxtext_ling2.stock_command.metrics import Losses
from maxtext_ling2.stock_command.run import Run

MODEL = "ling2-tiny"
STEPS = 100

REQUIRED_DROP = 3.0
"""Minimum difference of the first and the final loss, in nats."""

REQUIRED_LOSS = 7.0
"""Upper limit of the final loss in nats. A uniform guess has 10.4, prediction by token frequency 6.2."""

LAST_STEPS = 10
"""Number of steps that the final loss is averaged over: the few sequences of a step differ by more than a nat."""

_INTERRUPTED = 130  # the shell's exit code for a process that SIGINT ended


def run(output_directory: Path, steps: int | None = None, model_name: str = MODEL) -> int:
  """Runs the demo and prints what it does; the last line has the losses, the checkpoint and the plot.

  Args:
    output_directory: folder for the data (`data/`), each run's checkpoint, metrics, log and plot (`run-*/`).
    steps: training steps; None: enough for about 4 minutes on 2 CPU cores.
    model_name: MaxText's model_name.

  Returns:
    Exit code: 0, 1 after an error, which is printed, or 130 after Ctrl-C.
  """
  console = terminal.console()
  try:
    _run(output_directory, STEPS if steps is None else steps, model_name, console)
  except (Ling2Error, OSError) as error:
    text = describe(error) if isinstance(error, OSError) else str(error)
    terminal.print_error(text)
    return 1
  except KeyboardInterrupt:
    print("stopped; the trainer has ended, too", file=sys.stderr)
    return _INTERRUPTED
  return 0


def _run(output_directory: Path, steps: int, model_name: str, console: Console) -> None:
  dataset = data.prepare(output_directory.resolve() / "data")
  console.print(f"text: {dataset.documents} documents, {dataset.tokens:,} tokens in {str(dataset.prefix)}.bin")
  platform = shell.backend()
  files = train.new_run(output_directory, steps)
  command, variables = train.command(model_name, dataset, files, platform), train.environment(platform)
  console.print(f"training on {platform} with\n\n{shell.as_shell(command, variables)}\n")
  losses = train.train(command, variables, files, console).metrics.losses
  plot.draw(losses, MTP_LOSS_SCALING_FACTOR, f"{model_name} on CPython's documentation, {platform}", files.plot)
  learned = judge(losses, files)
  _write_paragraph(model_name, files, variables, console)
  console.print(f"{learned}; checkpoint {train.checkpoint(files)}, plot {files.plot}")


def _write_paragraph(model_name: str, files: Run, variables: dict[str, str], console: Console) -> None:
  command = sample.command(model_name, train.checkpoint(files))
  console.print(f"what it has learned, by\n\n{shell.as_shell(command, variables)}\n")
  console.print(f"{sample.write(command, variables, files.log)}\n")


def judge(losses: Losses, files: Run) -> str:
  """Says what the model has learned: the first and the final loss, in nats.

  Raises:
    DemoError: the model has not learned what it should; fewer than `STEPS` steps are too few to tell.
  """
  if len(losses.main) < files.steps:
    raise DemoError(f"{files.metrics} has {len(losses.main)} of {files.steps} steps; see {files.log}")
  first = losses.main[0]
  if files.steps < STEPS:
    text = f"loss {first:.3f} -> {losses.main[-1]:.3f} nats in {files.steps} steps (first; last)"
    return f"{text}: too few to tell whether it learns, {STEPS} are enough"
  final = statistics.fmean(losses.main[-LAST_STEPS:])
  if not (final <= first - REQUIRED_DROP and final < REQUIRED_LOSS):  # so that NaN fails
    raise DemoError(
      f"loss went from {first:.3f} to {final:.3f} nats in {files.steps} steps; a model that learns gets {REQUIRED_DROP} "
      f"nats lower and below {REQUIRED_LOSS}: {STEPS} steps are enough. See {files.folder}"
    )
  return f"loss {first:.3f} -> {final:.3f} nats in {files.steps} steps (first; mean of the last {LAST_STEPS})"
