"""Two real processes with `jax.distributed` on one machine, four CPU devices each, against one process with eight.

MaxText's port (1234) is fixed, so these tests are in one file, on one worker. The learning rate is small because the
tiny model's gradient is steep: with MaxText's rate, rounding (1e-6 of a weight) is 1e-3 of the next gradient's norm.
"""

import os
import signal
import time

import numpy as np
import pytest
from stock_runs import arguments, metrics, run, start

SETTINGS = {
  "dataset_type": "synthetic",
  "ici_fsdp_parallelism": 4,
  "ici_tensor_parallelism": 2,
  "per_device_batch_size": 1,
  "learning_rate": 1e-4,
}
DEADLINE = 300  # seconds until the survivor must have ended; JAX's heartbeat takes about 100


def devices(number):
  return {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={number}"}


def start_two(folder, name, steps, **settings):
  """The two processes; each writes its own metrics, {name}_0 and {name}_1."""
  # Without the cache of compiled programs: process 0 alone writes it, so with it the other is late by a compilation, and
  # Gloo waits for it 30 seconds only.
  shared = {
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "JAX_COORDINATOR_ADDRESS": "127.0.0.1",
    "JOB_INDEX": "0",
    "PROCESSES_IN_JOB": "2",
    "JAX_PROCESS_COUNT": "2",
  }
  settings = SETTINGS | settings | {"skip_jax_distributed_system": False}
  return [
    start(
      folder,
      arguments(folder, name, f"{name}_{index}", steps, **settings),
      **shared | devices(4) | {"JOB_COMPLETION_INDEX": str(index)},
    )
    for index in range(2)
  ]


def finished(processes):
  """What they printed."""
  outputs = [process.communicate(timeout=DEADLINE)[0] for process in processes]
  for process, output in zip(processes, outputs, strict=True):
    assert process.returncode == 0, output[-5000:]
  return outputs


def assert_equal(ours, expected, steps):
  for step in steps:
    assert set(ours[step]) == set(expected[step])
    for name, value in expected[step].items():
      np.testing.assert_allclose(ours[step][name], value, rtol=1e-5, atol=1e-6, err_msg=f"{step} {name}")


pytestmark = pytest.mark.mesh


def test_two_processes_equal_one_and_what_they_save_is_continued_by_one(tmp_path):
  layers = {"base_num_decoder_layers": 3}
  finished(start_two(tmp_path, "two", 3, **layers))
  run(
    tmp_path,
    arguments(tmp_path, "one", "one", 5, **SETTINGS, **layers),
    arguments(tmp_path, "two", "continued", 5, **SETTINGS, **layers),  # from what the two processes have saved
    **devices(8),
  )
  expected = metrics(tmp_path, "one")
  assert sorted(expected) == [0, 1, 2, 3, 4]
  assert_equal(metrics(tmp_path, "two_0"), expected, [0, 1, 2])
  continued = metrics(tmp_path, "continued")
  assert sorted(continued) == [3, 4]
  assert_equal(continued, expected, [3, 4])


@pytest.mark.slow  # JAX waits 100 seconds for a heartbeat
def test_one_is_killed(tmp_path):
  """The other ends with JAX's word for it, and the last checkpoint is continued."""
  survivor, victim = start_two(tmp_path, "killed", 100000, checkpoint_period=2)
  checkpoints = tmp_path / "killed" / "checkpoints"
  waited = 0.0
  while not (checkpoints / "2" / "items").is_dir():
    assert victim.poll() is None, victim.communicate()[0][-5000:]
    assert waited < DEADLINE
    waited += 0.2
    time.sleep(0.2)
  victim.send_signal(signal.SIGKILL)
  victim.wait()
  output, _ = survivor.communicate(timeout=DEADLINE)
  assert survivor.returncode != 0
  assert "stopped sending heartbeat" in output, output[-3000:]  # what JAX says after its timeout
  last = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
  run(tmp_path, arguments(tmp_path, "killed", "revived", last + 3, **SETTINGS), **devices(8))
  assert sorted(metrics(tmp_path, "revived")) == [last + 1, last + 2]


@pytest.mark.slow
def test_a_preemption_notice_to_one_stops_both_after_the_same_step_with_a_checkpoint(tmp_path):
  """JAX's preemption service takes SIGTERM; MaxText's loop would end without a checkpoint."""
  processes = start_two(tmp_path, "stopped", 100000)
  file = tmp_path / "stopped_0.jsonl"
  waited = 0.0
  while not (file.exists() and file.read_text().count("\n") > 2):
    assert processes[0].poll() is None, processes[0].communicate()[0][-5000:]
    assert waited < DEADLINE
    waited += 0.2
    time.sleep(0.2)
  processes[1].send_signal(signal.SIGTERM)
  outputs = [process.communicate(timeout=DEADLINE)[0] for process in processes]
  assert [process.returncode for process in processes] == [143, 143], outputs[1][-5000:]
  last = max(metrics(tmp_path, "stopped_0"))
  where = tmp_path / "stopped" / "checkpoints" / str(last)
  text = f"maxtext-ling2: stopped by SIGTERM after step {last}; checkpoint {where}; the same command goes on from there\n"
  assert all(text in output for output in outputs)
  run(tmp_path, arguments(tmp_path, "stopped", "revived", last + 3, **SETTINGS), **devices(8))
  assert sorted(metrics(tmp_path, "revived")) == [last + 1, last + 2]
