"""The demo around the training: the command, how a trainer is followed and ended, the verdict. Trainers are stand-ins."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from maxtext_ling2 import demo
from maxtext_ling2.demo import sample, train
from maxtext_ling2.demo.data import Dataset
from maxtext_ling2.demo.errors import DemoError
from maxtext_ling2.stock_command import metrics, plot, shell
from maxtext_ling2.stock_command.metrics import Losses
from maxtext_ling2.stock_command.run import Run

pytestmark = pytest.mark.unit

TRAINER = """
import json, os, pathlib, sys, time
folder, losses, then = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
print("first line of the log", os.environ["ASKED"], flush=True)
with (folder / "metrics.jsonl").open("a") as file:
  for step, loss in enumerate(losses):
    record = {"learning/lm_loss": loss, "learning/mtp_loss": loss / 10, "step": float(step), "run_name": "x"}
    file.write(json.dumps(record) + "\\n")
(folder / "checkpoints" / str(len(losses) - 1)).mkdir(parents=True)
(folder / "pid").write_text(str(os.getpid()))
if then == "hang":
  time.sleep(600)
sys.exit(then if then != "done" else 0)
"""


@pytest.fixture(autouse=True)
def twenty_steps_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(demo, "STEPS", 20)


@pytest.fixture
def files(tmp_path: Path) -> Run:
  return train.new_run(tmp_path, 20)


def trainer(files: Run, losses: list[float], then: str = "done") -> list[str]:
  return [sys.executable, "-c", TRAINER, str(files.folder), json.dumps(losses), then]


def falling(last: float) -> list[float]:
  return [10.5] + 19 * [last]


def alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


def test_progress_is_printed_where_no_terminal_is(files: Run, capsys: pytest.CaptureFixture[str]) -> None:
  train.train(trainer(files, falling(6.0)), {"ASKED": "yes"}, files, Console(soft_wrap=True))
  out = capsys.readouterr().out
  assert "starting MaxText" in out
  assert "step 20/20, loss 6.000, about 0 s left" in out
  assert files.log.read_text() == "first line of the log yes\n"
  assert train.checkpoint(files).name == "19"


def test_progress_bar_on_a_terminal(files: Run) -> None:
  console = Console(force_terminal=True, width=200, record=True)
  train.train(trainer(files, falling(6.0)), {"ASKED": "yes"}, files, console)
  assert "20/20 loss 6.000" in console.export_text()


def test_failure_names_exit_code_log_and_its_last_lines(files: Run) -> None:
  with pytest.raises(DemoError) as error:
    train.train(trainer(files, [], "the reason stands here"), {"ASKED": "yes"}, files, Console(quiet=True))
  text = str(error.value)
  assert "exit code 1" in text
  assert text.endswith(f"the last lines of {files.log}:\nfirst line of the log yes\nthe reason stands here")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_trainer_ends_with_the_demo(files: Run, number: signal.Signals) -> None:
  pid_file = files.folder / "pid"

  def interrupt() -> None:
    while not (pid_file.is_file() and pid_file.read_text()):
      time.sleep(0.05)
    os.kill(os.getpid(), number)

  before = signal.getsignal(signal.SIGTERM)
  # A shell starts its background jobs with SIGINT ignored, and so may whoever runs the tests.
  inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
      train.train(trainer(files, [], "hang"), {"ASKED": "yes"}, files, Console(quiet=True))
  finally:
    signal.signal(signal.SIGINT, inherited)
  assert not alive(int(pid_file.read_text()))
  assert signal.getsignal(signal.SIGTERM) is before


def test_the_printed_command_is_the_command(files: Run) -> None:
  dataset = Dataset(Path("/a folder/with 'quotes'/text"), 3, 100)
  arguments, variables = train.command("ling2-tiny", dataset, files, "cpu"), train.environment("cpu")
  text = shell.as_shell(arguments, variables)
  assert text.startswith("DECOUPLE_GCLOUD=TRUE JAX_PLATFORMS=cpu ")
  code = "import json, sys; print(json.dumps(sys.argv[1:]))"
  shown = text.replace(shlex.quote(sys.executable) + " -m", shlex.join([sys.executable, "-c", code, "-m"]), 1)
  done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True)
  assert json.loads(done.stdout) == arguments[1:]
  assert "grain_train_files=/a folder/with 'quotes'/text" in arguments
  assert {"model_name=ling2-tiny", "hardware=cpu", "reset_attention_mask=true", "mmap_eod_id=2"} <= set(arguments)


@pytest.mark.parametrize(
  ("found_by", "module"), [("pth", "maxtext."), ("start", "maxtext."), ("import", "maxtext_ling2")]
)
def test_without_pth_files_the_command_starts_the_plugin(
  files: Run, monkeypatch: pytest.MonkeyPatch, found_by: str, module: str
) -> None:
  monkeypatch.setattr(shell.startup, "found_by", found_by)
  assert train.command("ling2-tiny", Dataset(Path("/t"), 1, 1), files, "cpu")[2].startswith(module)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_an_accelerator_is_left_as_it_is(files: Run, platform: str) -> None:
  assert train.environment(platform) == {"DECOUPLE_GCLOUD": "TRUE"}
  arguments = train.command("ling2-tiny", Dataset(Path("/t"), 1, 1), files, platform)
  assert f"hardware={platform}" in arguments
  assert not [argument for argument in arguments if argument.startswith(("sparse_matmul", "dtype"))]


def test_a_line_that_is_being_written_does_not_count(tmp_path: Path) -> None:
  file = tmp_path / "metrics.jsonl"
  assert metrics.MetricsFile(file).losses == Losses([], [], [])
  file.write_text('{"learning/lm_loss": 10.5, "learning/mtp_loss": 1.0}\n{"learning/lm_loss": 9')
  assert metrics.MetricsFile(file).losses == Losses([10.5], [1.0], [0])


@pytest.mark.parametrize(
  ("losses", "reason"),
  [
    (falling(6.9), None),
    (falling(7.0), r"from 10\.500 to 7\.000 nats in 20 steps"),
    ([9.0] + 19 * [6.5], r"from 9\.000 to 6\.500 nats"),
    (falling(float("nan")), r"from 10\.500 to nan nats"),
    ([10.5, 6.0], r"has 2 of 20 steps"),
  ],
)
def test_verdict(files: Run, losses: list[float], reason: str | None) -> None:
  if reason is None:
    assert demo.judge(Losses(losses, []), files) == ("loss 10.500 -> 6.900 nats in 20 steps (first; mean of the last 10)")
  else:
    with pytest.raises(DemoError, match=reason):
      demo.judge(Losses(losses, []), files)


def test_plot_is_a_png_that_replaces_an_old_one(tmp_path: Path) -> None:
  path = tmp_path / "loss.png"
  path.write_text("old")
  plot.draw(Losses(falling(6.0), falling(0.6)), 0.1, "title", path)
  assert path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[float]:
  """Losses that the trainer of `demo.run` will report instead of training."""
  losses: list[float] = []
  monkeypatch.setenv("ASKED", "yes")
  monkeypatch.setattr(train, "command", lambda model, dataset, files, platform: trainer(files, losses))
  paragraph = [sys.executable, "-c", "print('a paragraph')"]
  monkeypatch.setattr(sample, "command", lambda model, checkpoint: paragraph)
  return losses


def test_run_prints_the_losses_and_the_places_last(
  tmp_path: Path, stand_in: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
  stand_in.extend(falling(6.0))
  assert demo.run(tmp_path / "out", 20) == 0
  *others, last = capsys.readouterr().out.splitlines()
  assert "a paragraph" in others
  (folder,) = (tmp_path / "out").glob("run-*")
  places = f"checkpoint {folder}/checkpoints/19, plot {folder}/loss.png"
  assert last == f"loss 10.500 -> 6.000 nats in 20 steps (first; mean of the last 10); {places}"
  assert (folder / "loss.png").is_file()


def test_a_run_too_short_for_a_verdict_is_no_failure(
  tmp_path: Path, stand_in: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
  stand_in.extend([10.5, 10.4, 10.3])
  assert demo.run(tmp_path / "out", 3) == 0
  last = capsys.readouterr().out.splitlines()[-1]
  assert last.startswith(
    "loss 10.500 -> 10.300 nats in 3 steps (first; last): too few to tell whether it learns, 20 are enough"
  )


def test_a_model_that_cannot_write_is_an_error(
  tmp_path: Path, stand_in: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  stand_in.extend(falling(6.0))
  monkeypatch.setattr(sample, "command", lambda model, checkpoint: [sys.executable, "-c", "raise SystemExit(3)"])
  assert demo.run(tmp_path / "out", 20) == 1
  assert "generating has failed with exit code 3" in capsys.readouterr().err


def test_run_fails_with_a_reason(tmp_path: Path, stand_in: list[float], capsys: pytest.CaptureFixture[str]) -> None:
  stand_in.extend(falling(9.0))
  assert demo.run(tmp_path / "out", 20) == 1
  assert "loss went from 10.500 to 9.000 nats in 20 steps" in capsys.readouterr().err
  (tmp_path / "file").write_text("")
  assert demo.run(tmp_path / "file", 20) == 1
  assert "file" in capsys.readouterr().err.splitlines()[-1]
