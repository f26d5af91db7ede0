"""The words of a stock command: interpreter, module, settings, environment variables."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

from maxtext_ling2 import startup
from maxtext_ling2.maxtext_api import start
from maxtext_ling2.stock_command.errors import StockCommandError

PRE_TRAINING = "maxtext.trainers.pre_train.train"
FINE_TUNING = "maxtext.trainers.post_train.sft.train_sft_native"
TO_MAXTEXT = "maxtext.checkpoint_conversion.to_maxtext"
TO_HUGGING_FACE = "maxtext.checkpoint_conversion.to_huggingface"

_SEVERAL_HOSTS = ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_IP", "MEGASCALE_COORDINATOR_ADDRESS")


def python_module(module: str) -> list[str]:
  """The words that run one of MaxText's modules with LING2 in place."""
  # Where Python has processed our .pth file, MaxText knows the model already.
  words = [module] if startup.found_by in ("pth", "start") else ["maxtext_ling2", "run", module]
  return [sys.executable, "-m", *words]


def several_hosts() -> bool:
  """Whether this process is one of several, as far as the environment says."""
  return any(os.environ.get(name) for name in _SEVERAL_HOSTS) or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def backend() -> str:
  """The platform that JAX uses here: "cpu", "gpu" or "tpu".

  Raises:
    StockCommandError: JAX finds no device.
  """
  if os.environ.get("JAX_PLATFORMS") == "cpu":
    return "cpu"
  # In another process, because a process that has initialised a TPU holds it, and the trainer could not use it.
  code = "import jax; print(jax.default_backend())"
  probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  if probe.returncode:
    raise StockCommandError(f"JAX finds no device:\n{probe.stderr.strip()}\nSet JAX_PLATFORMS=cpu to train on the CPU")
  return probe.stdout.split()[-1]


def environment(platform: str) -> dict[str, str]:
  """Environment variables that a stock command needs in addition to the user's."""
  if platform != "cpu":
    return {}
  # Without an accelerator, JAX would look for a TPU first wherever libtpu is installed.
  return start.ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}


def as_shell(arguments: Sequence[str], variables: Mapping[str, str]) -> str:
  """Formats a command as text that can be pasted into a shell."""
  text = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
  for argument in arguments:
    text += (" \\\n  " if "=" in argument else " ") + shlex.quote(argument)
  return text.strip()
