"""Training goes on from a checkpoint as if it had never stopped, through MaxText's own trainer in new processes."""

import time

import numpy as np
import pytest
from stock_runs import arguments, checkpoint, metrics, outputs, run, start, write_documents

OFTEN, SELDOM = [(False, 1)], [(True, 2), (False, 2), (True, 1)]  # (scan, accumulation)
LAYERS = {False: {"base_num_decoder_layers": 3}, True: {}}  # by scan


def case_name(scan, accumulation):
  return f"{'scanned' if scan else 'unscanned'}_{accumulation}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def data(folder):
  return write_documents(folder)


def settings_of(data, scan, accumulation):
  return data | LAYERS[scan] | {"scan_layers": scan, "gradient_accumulation_steps": accumulation}


def first_parts(folder, data, cases):
  """10 steps, and 5 steps."""
  for case in cases:
    name, settings = case_name(*case), settings_of(data, *case)
    yield arguments(folder, f"straight_{name}", f"straight_{name}", 10, **settings)
    yield arguments(folder, f"parts_{name}", f"first_{name}", 5, **settings)


def second_parts(folder, data, cases):
  """5 steps more."""
  for case in cases:
    name = case_name(*case)
    yield arguments(folder, f"parts_{name}", f"second_{name}", 10, **settings_of(data, *case))


# Checkpoints that differ from the model in the router bias, which is no parameter here.
NO_BIAS = {"routed_bias": False, "routed_bias_update_rate": 0.0}


FROZEN = {"routed_bias_update_rate": 0.0, "learning_rate": 0.0}


@pytest.fixture(scope="module")
def small(data):
  return data | LAYERS[False] | {"scan_layers": False}


@pytest.fixture(scope="module")
def printed(folder, data, small):
  """{name: what a run printed} of the runs of a second process, which go on from what a first one has saved."""
  run(folder, *first_parts(folder, data, OFTEN), arguments(folder, "without", "without_1", 2, **small, **NO_BIAS))
  found = run(folder, *second_parts(folder, data, OFTEN), arguments(folder, "without", "without_2", 3, **small | FROZEN))
  names = (*map(case_name, *zip(*OFTEN, strict=True)), "without_2")
  return dict(zip(names, outputs(found), strict=True))


@pytest.fixture(scope="module")
def printed_by_others(folder, small, printed):
  """Loads a checkpoint with a trained bias, and the weights of checkpoints with biases and without."""
  run(folder, arguments(folder, "trained", "trained_1", 2, **small, enable_routed_bias_grad=True))
  weights = {"learning_rate": 0.0, "load_parameters_path": folder / "straight_unscanned_1/checkpoints/9/items"}
  old = weights | {"load_parameters_path": folder / "without/checkpoints/1/items"}
  found = run(
    folder,
    arguments(folder, "trained", "trained_2", 3, **small | FROZEN),
    arguments(folder, "weights", "weights", 1, **small | weights | FROZEN),
    arguments(folder, "old_weights", "old_weights", 1, **small | old | FROZEN),
  )
  return dict(zip(("trained_2", "weights", "old_weights"), outputs(found), strict=True))


@pytest.fixture(scope="module")
def others_resumed(folder, data):
  run(folder, *first_parts(folder, data, SELDOM))
  run(folder, *second_parts(folder, data, SELDOM))
  return folder


@pytest.mark.parametrize("case", OFTEN)
def test_training_goes_on_to_the_bit(printed, folder, case):
  assert_equal_to_the_bit(folder, case_name(*case))


@pytest.mark.slow
@pytest.mark.parametrize("case", SELDOM)
def test_training_goes_on_to_the_bit_otherwise(others_resumed, case):
  assert_equal_to_the_bit(others_resumed, case_name(*case))


def assert_equal_to_the_bit(resumed, name):
  """The metrics of every step, and everything in the last checkpoint."""
  straight = metrics(resumed, f"straight_{name}")
  parts = metrics(resumed, f"first_{name}") | metrics(resumed, f"second_{name}")
  assert sorted(straight) == list(range(10))
  assert min(metrics(resumed, f"second_{name}")) == 5
  assert parts == straight
  straight, parts = (checkpoint(resumed, f"{kind}_{name}", 9) for kind in ("straight", "parts"))
  assert set(straight) == set(parts)
  for path, value in straight.items():
    np.testing.assert_array_equal(parts[path], value, err_msg=path)


def test_what_a_checkpoint_holds(printed, folder):
  stored = checkpoint(folder, "straight_unscanned_1", 9)
  biases = [path for path in stored if path.endswith("['gate']['bias']")]
  assert len(biases) == 2 + 1  # all layers but the dense one, and MTP; weights only, no optimizer slot
  assert all(path.startswith("['params']['params']") for path in biases)
  assert all(np.abs(stored[path]).max() > 0 for path in biases)
  assert not [path for path in stored if "counts" in path or "z_loss" in path]
  for slot in ("mu", "nu"):
    assert any(f"['{slot}']" in path and "mtp_block" in path and "MoeBlock_0" in path for path in stored)


def bias_norms(line):
  return {key: value for key, value in line.items() if "bias_norm" in key}


def test_a_checkpoint_without_biases_loads_and_says_so(printed, folder):
  check_lack_of_biases(printed["without_2"], metrics(folder, "without_2")[2])


@pytest.mark.slow
def test_weights_without_biases_load_and_say_so(printed_by_others, folder):
  check_lack_of_biases(printed_by_others["old_weights"], metrics(folder, "old_weights")[0])


def check_lack_of_biases(output, line):
  assert "does not have" in output and "gate/bias" in output and "3 variable(s) start at their initial values" in output
  assert set(bias_norms(line).values()) == {0.0}


@pytest.mark.slow
def test_a_trained_bias_is_found_where_it_is_no_parameter(printed_by_others, folder):
  assert "does not have" not in printed_by_others["trained_2"]
  before = bias_norms(metrics(folder, "trained_1")[1])
  assert min(before.values()) > 0
  assert bias_norms(metrics(folder, "trained_2")[2]) == before


@pytest.mark.slow
def test_the_weights_of_a_training_checkpoint_include_the_biases(printed_by_others, folder):
  before = bias_norms(metrics(folder, "straight_unscanned_1")[9])
  assert bias_norms(metrics(folder, "weights")[0]) == before


@pytest.mark.slow
def test_killed_during_a_save_the_previous_checkpoint_restores(folder, data):
  settings = data | {"scan_layers": True, "checkpoint_period": 1}
  process = start(folder, arguments(folder, "killed", "killed_1", 1000, **settings))
  checkpoints = folder / "killed" / "checkpoints"

  def unfinished():
    names = (path.name.partition(".orbax-checkpoint-tmp") for path in checkpoints.glob("*"))
    return [number for number, temporary, _ in names if temporary and int(number) >= 2]

  deadline = time.monotonic() + 300
  try:
    while not unfinished():
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.0005)
  finally:
    process.kill()
    output, _ = process.communicate()
  assert unfinished(), output[-3000:]
  complete = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]
  last = max(complete)
  run(folder, arguments(folder, "killed", "killed_2", last + 3, **settings))
  assert sorted(metrics(folder, "killed_2")) == [last + 1, last + 2]
  assert all(np.isfinite(list(line.values())).all() for line in metrics(folder, "killed_2").values())
