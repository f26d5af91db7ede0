"""The demo's training run: MaxText's own command in a process of its own, followed through the metrics it writes."""

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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from maxtext_ling2 import overrides, startup
from maxtext_ling2.demo import metrics
from maxtext_ling2.demo.data import EOD, Dataset
from maxtext_ling2.demo.errors import DemoError
from maxtext_ling2.host.location import maxtext_folder

TRAINER = "maxtext.trainers.pre_train.train"

MTP_SCALE = 0.1
"""mtp_loss_scaling_factor, MaxText's default: handed over all the same, because the plot divides by it."""

# Sizes for 2 CPU cores, where a step takes one second: its time goes with its tokens, 512 here, and starting MaxText and
# compiling take another minute.
SEQUENCE_LENGTH = 256
ROWS_PER_DEVICE = 2
LEARNING_RATE = 3e-3

_POLL_SECONDS = 0.5
_LINE_EVERY = 10  # steps, where the output is no terminal
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
    """All that the trainer prints."""
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
  """A folder of its own for each run: MaxText would go on from the checkpoint that it finds in an old one."""
  path = folder.resolve() / time.strftime("run-%Y%m%d-%H%M%S")
  path.mkdir(parents=True)
  return Run(path, steps)


def backend() -> str:
  """The platform JAX takes here: "cpu", "gpu" or "tpu"."""
  if os.environ.get("JAX_PLATFORMS") == "cpu":
    return "cpu"
  # In another process, because a process that has seen a TPU holds it, and the trainer could not have it.
  code = "import jax; print(jax.default_backend())"
  probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  if probe.returncode:
    raise DemoError(f"JAX finds no device:\n{probe.stderr.strip()}\nSet JAX_PLATFORMS=cpu to train on the CPU")
  return probe.stdout.split()[-1]


def environment(platform: str) -> dict[str, str]:
  """Environment variables that the trainer needs beyond the user's."""
  # With no accelerator, JAX left to itself would look for a TPU first wherever libtpu is installed.
  return {"DECOUPLE_GCLOUD": "TRUE"} | ({"JAX_PLATFORMS": "cpu"} if platform == "cpu" else {})


def command(model_name: str, dataset: Dataset, run: Run, platform: str) -> list[str]:
  """The documented command of stock MaxText."""
  # Where Python has processed our .pth file, MaxText knows the model without more ado.
  start = [TRAINER] if startup.found_by in ("pth", "start") else ["maxtext_ling2", "run", TRAINER]
  base = str(maxtext_folder() / "configs" / "base.yml")
  settings = {"model_name": model_name, "override_model_config": True}
  settings |= data_settings(dataset) | _run_settings(run) | _device_settings(platform)
  return [sys.executable, "-m", *start, base, *overrides.words(settings)]


def data_settings(dataset: Dataset) -> dict[str, object]:
  """Packed documents: every row of tokens is full, and each EOD in it ends a segment."""
  return {
    "dataset_type": "grain",
    "grain_file_type": "mmap",
    "grain_train_files": dataset.prefix,
    "mmap_eod_id": EOD,
    "packing": True,
    "reset_attention_mask": True,
    # MaxText's default merges segments shorter than 1/25 of a row into the one before.
    "packing_max_segments_per_sample": 0,
    "max_target_length": SEQUENCE_LENGTH,
    "per_device_batch_size": ROWS_PER_DEVICE,
    "num_epoch": 1000,  # as often as it takes: training ends with `steps`
    "grain_worker_count": 0,  # reading is quick, and a worker process would import MaxText once more
  }


def _run_settings(run: Run) -> dict[str, object]:
  return {
    "base_output_directory": run.folder.parent,
    "run_name": run.folder.name,
    "steps": run.steps,
    "learning_rate": LEARNING_RATE,
    "warmup_steps_fraction": 0.1,
    "mtp_loss_scaling_factor": MTP_SCALE,
    "scan_layers": False,
    "metrics_file": run.metrics,
    "enable_tensorboard": False,
    "save_checkpoint_on_start": False,
    "save_checkpoint_on_completion": True,
    "log_config": False,
    "jax_cache_dir": "",
  }


def _device_settings(platform: str) -> dict[str, object]:
  settings: dict[str, object] = {"hardware": platform, "skip_jax_distributed_system": True}
  if platform == "cpu":
    # The kernels of sparse_matmul are for accelerators: on a CPU an interpreter runs them, at minutes a step. And few
    # CPUs calculate in bfloat16; the others emulate it.
    settings |= {"sparse_matmul": False, "dtype": "float32"}
  return settings


def as_shell(arguments: Sequence[str], variables: Mapping[str, str]) -> str:
  """The command as text that can be pasted into a shell."""
  text = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
  for argument in arguments:
    text += (" \\\n  " if "=" in argument else " ") + shlex.quote(argument)
  return text


def train(arguments: Sequence[str], variables: Mapping[str, str], run: Run, console: Console) -> None:
  """Run the trainer to its end and show its progress.

  It never outlives this call, whether that ends by an error, Ctrl-C or SIGTERM.

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
  """Have SIGTERM (`timeout`, a CI job that ends) do what Ctrl-C does: by itself it would leave the trainer running."""
  if threading.current_thread() is not threading.main_thread():  # Python sets signal handlers nowhere else
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
    TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
    TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
  )  # fmt: skip
  waiting = "starting MaxText, compiling"
  if not console.is_terminal:
    console.print(f"{waiting} ...")
  with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
    task = progress.add_task(waiting, total=run.steps, loss="-")
    shown, first_seen = 0, 0.0
    while True:
      ended = process.poll() is not None  # asked first, so that what was written before the end is still shown
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
  """The last lines of the trainer's log, and where the others are."""
  lines = run.log.read_text(errors="replace").splitlines()
  return "\n".join([f"the last lines of {run.log}:", *lines[-_LOG_LINES:]])
