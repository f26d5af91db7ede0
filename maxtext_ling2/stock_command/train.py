"""`maxtext-ling2 train` and `sft`: MaxText's trainers, printed, run and followed."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from maxtext_ling2.configs.validation import CUSTOM_MODEL
from maxtext_ling2.maxtext_api import overrides
from maxtext_ling2.stock_command import check, next_commands, plot, shell
from maxtext_ling2.stock_command.errors import StockCommandError
from maxtext_ling2.stock_command.run import Outcome, Run, follow
from maxtext_ling2.stock_command.settings import Settings, model_names, split
from maxtext_ling2.stock_command.sizes import size
from maxtext_ling2.training.checkpoint_report import readable

FOLDER = "maxtext_output"
"""Where runs go unless base_output_directory says otherwise, as in MaxText."""

MODULES = {"train": shell.PRE_TRAINING, "sft": shell.FINE_TUNING}


def run(command: str, words: Sequence[str], dry_run: bool, console: Console) -> int:
  """Runs a trainer, or with `dry_run` only prints its command and checks its settings.

  Args:
    command: "train" or "sft".
    words: as for MaxText's trainer.
    dry_run: whether nothing is trained.
    console: where everything but the trainer's own output is shown.

  Returns:
    The trainer's exit code.

  Raises:
    ValueError: the words are no settings, or no model is named.
    StockCommandError: the settings are refused, or this process is one of several.
  """
  module = MODULES[command]
  settings = Settings(split(words), module)
  _check(settings, dry_run)
  platform = shell.backend()
  added = additions(settings, platform)
  files = _files(settings, added)
  arguments = [*shell.python_module(module), *settings.words.all(added)]
  variables = shell.environment(platform)
  console.print(f"training on {platform} with\n\n{shell.as_shell(arguments, variables)}\n")
  if dry_run:
    words = [*overrides.words(added), *settings.words.settings]
    console.print(check.describe(words, settings.yml, module, variables))
    return 0
  files.folder.mkdir(parents=True, exist_ok=True)
  console.print(f"log: {str(files.log)}")
  outcome = follow(arguments, variables, files, console)
  _report(command, settings, added, files, outcome, console)
  return outcome.ended.code


def _check(settings: Settings, dry_run: bool) -> None:
  if not settings.given("model_name"):
    names = ", ".join(name for name in model_names() if name != CUSTOM_MODEL)
    raise StockCommandError(
      f"model_name: not given, and MaxText would train a model of its own; add one of {names} (ling2-tiny is for CPUs), "
      "or begin with the YAML file of your own model, such as `maxtext-ling2 config` writes"
    )
  base = str(settings.value("base_output_directory") or "")
  if base and "://" not in base and not Path(base).is_absolute():
    raise StockCommandError(
      f"base_output_directory={base}: MaxText writes no checkpoint below a relative path; write "
      f"base_output_directory={Path(base).resolve()}"
    )
  if shell.several_hosts() and not dry_run:
    raise StockCommandError(
      "this process is one of several, as the environment says (JAX_COORDINATOR_ADDRESS, TPU_WORKER_HOSTNAMES): start "
      "MaxText's own command in each of them; --dry-run prints it"
    )


def additions(settings: Settings, platform: str) -> dict[str, Any]:
  """Settings that this command adds to the user's: where the run's files are, and what the platform needs."""
  base = settings.value("base_output_directory") or str(Path(FOLDER).resolve())
  name = settings.value("run_name") or f"{settings.model}-{time.strftime('%Y%m%d-%H%M%S')}"
  local = Path(FOLDER).resolve() if "://" in str(base) else Path(base).resolve()
  places = {"base_output_directory": base, "run_name": name, "metrics_file": local / name / "metrics.jsonl"}
  missing = {field: value for field, value in places.items() if not settings.value(field)}
  needed = settings.for_platform(platform)
  return missing | needed | settings.sizes(platform) | settings.permission(needed)


def _files(settings: Settings, added: dict[str, Any]) -> Run:
  values = {
    field: added.get(field) or settings.value(field) for field in ("base_output_directory", "run_name", "metrics_file")
  }
  base, name = str(values["base_output_directory"]), str(values["run_name"])
  local = Path(FOLDER).resolve() if "://" in base else Path(base).resolve()
  steps = int(settings.value("steps"))
  if steps < 0:  # MaxText's rule
    steps = int(settings.value("learning_rate_schedule_steps"))
  return Run(local / name, steps, Path(values["metrics_file"]), f"{base.rstrip('/')}/{name}")


def _report(
  command: str, settings: Settings, added: dict[str, Any], files: Run, outcome: Outcome, console: Console
) -> None:
  """Draws the losses and prints what came of a run; raises StockCommandError if it has failed."""
  if outcome.metrics.last is not None:
    _draw(settings, files, outcome)
    console.print(f"{learned(outcome)}\nplot: {files.plot}; metrics: {files.metrics}")
  elif not outcome.ended.code:
    console.print(f"no step was left to train: this run has had its {files.steps} steps; add more, or another run_name")
  checkpoint = files.last_checkpoint()
  if checkpoint is not None:
    console.print(f"checkpoint: {checkpoint} ({readable(size(checkpoint))})")
  elif "://" in files.output:
    console.print(f"checkpoints: {files.checkpoints}")
  ended = outcome.ended
  if ended.code and not ended.signals:
    raise StockCommandError(f"training has failed with exit code {ended.code}: {outcome.log.reason()}", ended.code)
  if ended.code and not outcome.log.says_stopped:
    console.print("stopped before its first step had ended: this run has saved nothing")
  for title, text in next_commands.after_training(command, settings, added, files, checkpoint, bool(ended.code)):
    console.print(f"{title}:\n  {text}")


def _draw(settings: Settings, files: Run, outcome: Outcome) -> None:
  scale = float(settings.value("mtp_loss_scaling_factor"))
  plot.draw(outcome.metrics.losses, scale, f"{settings.model}, {files.folder.name}", files.plot)


def learned(outcome: Outcome) -> str:
  """The first and the last loss of a run that has reported one, and its speed."""
  losses = outcome.metrics.trained()
  text = (
    f"loss {losses.main[0]:.3f} -> {losses.main[-1]:.3f} nats per token (steps {losses.steps[0]} and {losses.steps[-1]})"
  )
  rate, devices = outcome.metrics.tokens_per_second(), outcome.log.devices
  if rate is None:
    return text
  return f"{text}; {rate * (devices or 1):,.0f} tokens/s" + ("" if devices else " per device")
