"""A training run that is killed at any moment goes on as if it had not been: SIGKILL, then new processes."""

import random
import time

import pytest
from stock_runs import arguments, metrics, run, start, write_documents

pytestmark = pytest.mark.hostile

SETTINGS = {"scan_layers": True, "checkpoint_period": 2, "async_checkpointing": True}


def has_trained(file):
  return file.exists() and file.stat().st_size > 0


def kill_at(process, file, moment, after_first_step):
  """Kills `moment` seconds after the start or after the first step's metrics; returns whether it was trained by then."""
  deadline = time.monotonic() + 300
  while after_first_step and not has_trained(file):
    assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-3000:]
    time.sleep(0.01)
  time.sleep(moment)
  assert process.poll() is None, process.communicate()[0][-3000:]
  process.kill()
  process.communicate()
  return has_trained(file)


@pytest.mark.slow  # test_resume.py goes on with runs that ended by themselves
@pytest.mark.parametrize("kills", [3, 20])  # half a minute or a minute each
def test_kills_leave_the_loss_curve_as_it_is(tmp_path, kills):
  choose = random.Random(20)
  settings = write_documents(tmp_path) | SETTINGS
  curve, repeated, trained = {}, 0, 0
  for life in range(kills):
    process = start(tmp_path, arguments(tmp_path, "killed", f"life_{life}", 100_000, **settings))
    file = tmp_path / f"life_{life}.jsonl"
    # Every third dies while it imports, restores or compiles, maybe; the others in the midst of steps and saves.
    early = life % 3 == 2
    if not kill_at(process, file, choose.uniform(0, 20 if early else 4), not early):
      continue
    trained += 1
    for step, values in metrics(tmp_path, f"life_{life}").items():
      repeated += step in curve
      assert curve.setdefault(step, values) == values, (life, step)
  last = max(curve) + 3
  run(tmp_path, arguments(tmp_path, "killed", "last_life", last, **settings))
  final = metrics(tmp_path, "last_life")
  assert max(final) == last - 1
  run(tmp_path, arguments(tmp_path, "straight", "straight", last, **settings))
  straight = metrics(tmp_path, "straight")
  assert sorted(curve | final) == sorted(straight) == list(range(last))
  assert {step: straight[step] for step in curve} == curve and {step: straight[step] for step in final} == final
  assert trained >= kills - kills // 3
  assert repeated > 0 or kills < 20  # kills fell between a checkpoint and the next, too
