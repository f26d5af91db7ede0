"""The demo's training run: MaxText's own command in a separate process, followed through its metrics file."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from maxtext_ling2 import startup, terminal
from maxtext_ling2.checkpoint.hf_config import MTP_LOSS_SCALING_FACTOR
from maxtext_ling2.demo import metrics
from maxtext_ling2.demo.data import EOD, Dataset
from maxtext_ling2.demo.errors import DemoError
from maxtext_ling2.maxtext_api import overrides, session, start

TRAINER = "maxtext.trainers.pre_train.train"

"""mtp_loss_scaling_factor: MaxText's default, passed explicitly because the plot divides by it."""

# Sizes for 2 CPU cores, where a step of 512 tokens takes one second; starting MaxText and compiling take another minute.
SEQUENCE_LENGTH = 256
ROWS_PER_DEVICE = 2
LEARNING_RATE = 3e-3

_POLL_SECONDS = 0.5
_LINE_EVERY = 10  # steps, if the output is not a terminal
_GRACE_SECONDS = 10
_LOG_LINES = 15


@dataclass(frozen=True)
class Run:
  """Files of one training run; the layout of `checkpoints` is MaxText's.

  Attributes:
    folder: absolute path of base_output_directory/run_name.
    steps: training steps.
  """

  folder: Path
  steps: int

  @property
  def metrics(self) -> Path:
    """MaxText's metrics_file."""
    return self.folder / "metrics.jsonl"

  @property
  def log(self) -> Path:
    """Output of the trainer."""
    return self.folder / "train.log"

  def checkpoint(self) -> Path:
    """The checkpoint of the last step.

    Raises:
      DemoError: there is none.
    """
    path = self.folder / "checkpoints" / str(self.steps - 1)
    if not path.is_dir():
      raise DemoError(f"training has ended without its checkpoint {path}; {_read_on(self)}")
    return path


def new_run(folder: Path, steps: int) -> Run:
  """Creates a folder per run: MaxText would resume from a checkpoint in an old one."""
  path = folder.resolve() / time.strftime("run-%Y%m%d-%H%M%S")
  path.mkdir(parents=True)
  return Run(path, steps)


def backend() -> str:
  """The platform that JAX uses here: "cpu", "gpu" or "tpu"."""
  if os.environ.get("JAX_PLATFORMS") == "cpu":
    return "cpu"
  # In another process, because a process that has initialised a TPU holds it, and the trainer could not use it.
  code = "import jax; print(jax.default_backend())"
  probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  if probe.returncode:
    raise DemoError(f"JAX finds no device:\n{probe.stderr.strip()}\nSet JAX_PLATFORMS=cpu to train on the CPU")
  return probe.stdout.split()[-1]


def environment(platform: str) -> dict[str, str]:
  """Environment variables that the trainer needs in addition to the user's."""
  # Without an accelerator, JAX would look for a TPU first wherever libtpu is installed.
  return start.ENVIRONMENT | ({"JAX_PLATFORMS": "cpu"} if platform == "cpu" else {})


def command(model_name: str, dataset: Dataset, run: Run, platform: str) -> list[str]:
  """The documented command of stock MaxText."""
  # Where Python has processed our .pth file, MaxText knows the model already.
  module = [TRAINER] if startup.found_by in ("pth", "start") else ["maxtext_ling2", "run", TRAINER]
  base = str(start.maxtext_folder() / "configs" / "base.yml")
  settings = {"model_name": model_name, "override_model_config": True}
  settings |= data_settings(dataset) | _run_settings(run) | _device_settings(platform)
  return [sys.executable, "-m", *module, base, *overrides.words(settings)]


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


def as_shell(arguments: Sequence[str], variables: Mapping[str, str]) -> str:
  """Formats the command as text that can be pasted into a shell."""
  text = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
  for argument in arguments:
    text += (" \\\n  " if "=" in argument else " ") + shlex.quote(argument)
  return text


def train(arguments: Sequence[str], variables: Mapping[str, str], run: Run, console: Console) -> None:
  """Runs the trainer to its end and shows its progress.

  The trainer never outlives this call, even after an error, Ctrl-C or SIGTERM.

  Raises:
    DemoError: the trainer has failed; the text has the end of its log.
    KeyboardInterrupt: Ctrl-C or SIGTERM.
  """
  with run.log.open("wb") as log, _sigterm_interrupts():
    process = subprocess.Popen(
      arguments, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
    )
    try:
      _follow(process, run, console)
    finally:
      _end(process)
  if process.returncode:
    raise DemoError(f"training has failed with exit code {process.returncode}; {_read_on(run)}")


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
  """Makes SIGTERM (`timeout`, a CI job that ends) act as Ctrl-C, so that it ends the trainer too."""
  if threading.current_thread() is not threading.main_thread():  # Python allows signal handlers only there
    yield
    return

  def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt

  before = signal.signal(signal.SIGTERM, interrupt)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[bytes]) -> None:
  if process.poll() is None:
    process.terminate()
    try:
      process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()


def _follow(process: subprocess.Popen[bytes], run: Run, console: Console) -> None:
  columns = (
    terminal.text_column("{task.description}"), BarColumn(), MofNCompleteColumn(),
    terminal.text_column("loss {task.fields[loss]}"), TimeElapsedColumn(),
    terminal.text_column("left"), TimeRemainingColumn(),
  )  # fmt: skip
  waiting = "starting MaxText, compiling"
  if not console.is_terminal:
    console.print(f"{waiting} ...")
  with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
    task = progress.add_task(waiting, total=run.steps, loss="-")
    shown, first_seen = 0, 0.0
    while True:
      ended = process.poll() is not None  # first, so that what was written before the end is still shown
      losses = metrics.read(run.metrics).main
      if len(losses) > shown:
        first_seen = first_seen or time.monotonic()
        progress.update(task, description="training", completed=len(losses), loss=f"{losses[-1]:.3f}")
        if not console.is_terminal and len(losses) // _LINE_EVERY > shown // _LINE_EVERY:
          left = (time.monotonic() - first_seen) / max(len(losses) - 1, 1) * (run.steps - len(losses))
          console.print(f"step {len(losses)}/{run.steps}, loss {losses[-1]:.3f}, about {left:.0f} s left")
        shown = len(losses)
      if ended:
        return
      time.sleep(_POLL_SECONDS)


def _read_on(run: Run) -> str:
  """The last lines of the trainer's log, and its path."""
  lines = run.log.read_text(errors="replace").splitlines()
  return "\n".join([f"the last lines of {run.log}:", *lines[-_LOG_LINES:]])
