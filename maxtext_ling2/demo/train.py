"""The demo's training run: MaxText's own command in a separate process, followed through its metrics file."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from maxtext_ling2.checkpoint.hf_config import MTP_LOSS_SCALING_FACTOR
from maxtext_ling2.demo.data import EOD, Dataset
from maxtext_ling2.demo.errors import DemoError
from maxtext_ling2.maxtext_api import overrides, session, start
from maxtext_ling2.stock_command import shell
from maxtext_ling2.stock_command.run import Outcome, Run, follow
from maxtext_ling2.stock_command.settings import ROWS_PER_DEVICE, SEQUENCE_LENGTH

LEARNING_RATE = 3e-3


def new_run(folder: Path, steps: int) -> Run:
  """Creates a folder per run: MaxText would resume from a checkpoint in an old one."""
  path = folder.resolve() / time.strftime("run-%Y%m%d-%H%M%S")
  path.mkdir(parents=True)
  return Run(path, steps, path / "metrics.jsonl", str(path))


def environment(platform: str) -> dict[str, str]:
  """Environment variables that the trainer needs in addition to the user's."""
  return start.ENVIRONMENT | shell.environment(platform)


def command(model_name: str, dataset: Dataset, run: Run, platform: str) -> list[str]:
  """The documented command of stock MaxText."""
  base = str(start.maxtext_folder() / "configs" / "base.yml")
  settings = {"model_name": model_name, "override_model_config": True}
  settings |= data_settings(dataset) | _run_settings(run) | _device_settings(platform)
  return [*shell.python_module(shell.PRE_TRAINING), base, *overrides.words(settings)]


def data_settings(dataset: Dataset) -> dict[str, object]:
  """Packed documents: every sequence is full, and each EOD in it ends a segment."""
  return {
    "dataset_type": "grain",
    "grain_file_type": "mmap",
    "grain_train_files": dataset.prefix,
    "mmap_eod_id": EOD,
    "packing": True,
    "reset_attention_mask": True,
    # MaxText's default merges segments shorter than 1/25 of a sequence into the previous one.
    "packing_max_segments_per_sample": 0,
    "max_target_length": SEQUENCE_LENGTH,
    "per_device_batch_size": ROWS_PER_DEVICE,
    "num_epoch": 1000,  # enough: training ends with `steps`
    "grain_worker_count": 0,  # reading is fast, and a worker process would import MaxText again
  }


def _run_settings(run: Run) -> dict[str, object]:
  return {
    "base_output_directory": run.folder.parent,
    "run_name": run.folder.name,
    "steps": run.steps,
    "learning_rate": LEARNING_RATE,
    "warmup_steps_fraction": 0.1,
    "mtp_loss_scaling_factor": MTP_LOSS_SCALING_FACTOR,
    "scan_layers": False,
    "metrics_file": run.metrics,
    "enable_tensorboard": False,
    "save_checkpoint_on_start": False,
    "save_checkpoint_on_completion": True,
    "log_config": False,
    "jax_cache_dir": "",
  }


def _device_settings(platform: str) -> dict[str, object]:
  return {"hardware": platform, "skip_jax_distributed_system": True, **session.platform_settings(platform)}


def train(arguments: Sequence[str], variables: Mapping[str, str], run: Run, console: Console) -> Outcome:
  """Runs the trainer to its end and shows its progress.

  The trainer never outlives this call, even after an error, Ctrl-C or SIGTERM.

  Raises:
    DemoError: the trainer has failed; the text has the reason, or the end of its log.
    KeyboardInterrupt: Ctrl-C or SIGTERM.
  """
  outcome = follow(arguments, variables, run, console)
  if outcome.ended.signals:
    raise KeyboardInterrupt
  if outcome.ended.code:
    raise DemoError(f"training has failed with exit code {outcome.ended.code}; {outcome.log.reason()}")
  return outcome


def checkpoint(run: Run) -> Path:
  """The checkpoint of the last step.

  Raises:
    DemoError: there is none.
  """
  path = run.last_checkpoint()
  if path is None or path.name != str(run.steps - 1):
    raise DemoError(f"training has ended without the checkpoint of its last step in {run.checkpoints}; see {run.log}")
  return path
