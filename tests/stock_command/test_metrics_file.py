"""Reading MaxText's metrics_file while it is written, again after a restart, with evaluations in between."""

import json
from pathlib import Path

import pytest

from maxtext_ling2.stock_command.metrics import Losses, MetricsFile

pytestmark = pytest.mark.unit


def line(step: int, loss: float, seconds: float = 2.0) -> str:
  record = {"learning/lm_loss": loss, "learning/mtp_loss": loss / 10, "step": float(step), "run_name": "x"}
  record |= {"perf/step_time_seconds": seconds, "perf/per_device_tokens_per_sec": 100 / seconds}
  return json.dumps(record) + "\n"


EVALUATION = json.dumps({"eval/avg_loss": 1.0, "step": 0.0}) + "\n"


def test_evaluations_and_half_lines_are_no_steps(tmp_path: Path) -> None:
  file = tmp_path / "metrics.jsonl"
  metrics = MetricsFile(file)
  assert metrics.last is None
  file.write_text(line(0, 10.0) + EVALUATION + line(1, 9.0)[:20])
  metrics.read()
  assert metrics.losses == Losses([10.0], [1.0], [0])
  with file.open("a") as more:
    more.write(line(1, 9.0)[20:])
  metrics.read()
  metrics.read()
  assert metrics.losses == Losses([10.0, 9.0], [1.0, 0.9], [0, 1])
  assert metrics.last == (1, 9.0)


def test_a_resumed_run(tmp_path: Path) -> None:
  """It repeats the steps after its checkpoint; the plot has all steps once, the summary those of this run."""
  file = tmp_path / "metrics.jsonl"
  file.write_text(line(0, 10.0) + line(1, 9.0) + line(2, 8.0))
  metrics = MetricsFile(file)
  assert metrics.last is None
  with file.open("a") as more:
    more.write(line(2, 7.5) + line(3, 7.0))
  metrics.read()
  assert metrics.losses.main == [10.0, 9.0, 7.5, 7.0]
  assert (metrics.trained().steps, metrics.trained().main) == ([2, 3], [7.5, 7.0])


def test_a_file_that_maxtext_begins_again(tmp_path: Path) -> None:
  file = tmp_path / "metrics.jsonl"
  file.write_text(line(0, 10.0) + line(1, 9.0))
  metrics = MetricsFile(file)
  file.write_text(line(0, 5.0) + line(1, 4.0) + line(2, 3.0))  # longer than before, so its size does not tell
  metrics.read()
  assert metrics.losses.main == metrics.trained().main == [5.0, 4.0, 3.0]


def test_speed_is_without_the_first_two_steps(tmp_path: Path) -> None:
  file = tmp_path / "metrics.jsonl"
  metrics = MetricsFile(file)
  file.write_text(line(0, 9.0, 60.0) + line(1, 9.0, 30.0))
  metrics.read()
  assert metrics.tokens_per_second() is None
  with file.open("a") as more:
    more.write(line(2, 9.0, 1.0) + line(3, 9.0, 3.0))
  metrics.read()
  assert metrics.tokens_per_second() == pytest.approx(200 / 4)
