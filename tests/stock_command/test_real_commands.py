"""The commands that the summaries print, run as they stand there; Ctrl-C in between."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden" / "trailing_mtp"
OWN = [sys.executable, "-m", "maxtext_ling2"]
SIZES = ["max_target_length=32", "per_device_batch_size=1", "base_num_decoder_layers=5", "scan_layers=false"]
TRAIN = [*OWN, "train", "model_name=ling2-tiny", "dataset_type=synthetic", "run_name=first", *SIZES]


@pytest.fixture(autouse=True)
def sigint_is_not_ignored() -> Iterator[None]:
  """A shell starts its background jobs with SIGINT ignored, and so may whoever runs the tests."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def after(title: str, out: str) -> str:
  """The command below a title in a summary."""
  (found,) = re.findall(rf"^{re.escape(title)}.*:\n  (.*)$", out, re.MULTILINE)
  return str(found)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
  folder = tmp_path_factory.mktemp("real")
  # Without what pytest's folders bring: the commands have to work by themselves.
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

  def run(command: str) -> str:
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

  return run


@pytest.fixture(scope="module")
def trained(shell: Callable[[str], str]) -> str:
  return shell(subprocess.list2cmdline([*TRAIN, "steps=3"]))


def test_the_summary_of_a_run(trained: str) -> None:
  found = re.search(r"^loss (\d+\.\d{3}) -> (\d+\.\d{3}) nats per token \(steps 0 and 2\)", trained, re.MULTILINE)
  assert found and 9 < float(found[2]) < float(found[1]) < 12
  assert len(trained.splitlines()) < 45
  assert not [word for word in ("Config param", "[transformers]", "DECOUPLED NO-OP", "libtpu") if word in trained]


def test_the_printed_generate_and_export_work(trained: str, shell: Callable[[str], str]) -> None:
  assert shell(f"{after('let it write', trained)} --tokens 4").startswith("The for statement is used to")
  exported = shell(after("export it", trained))
  assert shell(f"{after('let it write', exported)} --tokens 4").startswith("The for statement is used to")


def test_train_on_ctrl_c_and_go_on(trained: str, shell: Callable[[str], str]) -> None:
  command = after("train on", trained).replace("steps=6", "steps=100000")
  folder = Path(re.findall(r"plot: (.*)/loss\.png", trained)[0])
  lines = len((folder / "metrics.jsonl").read_text().splitlines())
  run = subprocess.Popen(["bash", "-c", f"exec {command}"], stdout=subprocess.PIPE, text=True, process_group=0)
  while len((folder / "metrics.jsonl").read_text().splitlines()) <= lines + 1:
    assert run.poll() is None
    time.sleep(0.2)
  os.killpg(run.pid, signal.SIGINT)
  out, _ = run.communicate(timeout=300)
  assert run.returncode == 130
  assert "going on after step 2" in out
  (step,) = re.findall(r"^maxtext-ling2: stopped by SIGINT after step (\d+); checkpoint ", out, re.MULTILINE)
  assert (folder / "checkpoints" / step / "items").is_dir()
  last = int(step) + 3
  assert f"(steps {int(step) + 1} and {last - 1})" in shell(after("go on", out).replace("steps=100000", f"steps={last}"))


def test_the_printed_commands_after_a_conversion_work(shell: Callable[[str], str]) -> None:
  converted = shell(subprocess.list2cmdline([*OWN, "convert", str(GOLDEN), "ling"]))
  shell(after("compare it", converted))
  assert "(steps 0 and 1)" in shell(after("train from it", converted))
