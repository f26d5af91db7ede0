"""What MaxText's trainer makes of a checkpoint saved with other settings: it trains on as without a break, or refuses.

The learning rate is small because the tiny model's gradient is steep; see test_two_processes.py. A checkpoint without
biases is in test_resume.py, and which rows come next after a restore in test_restores_data.py.
"""

import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import test_two_processes
from stock_runs import arguments, checkpoint, metrics, run, start, write_documents
from test_two_processes import devices, finished, start_two

# A dense GLA layer, MLA, a scanned cycle of both, and MTP.
FOUR = {"base_num_decoder_layers": 4, "inhomogeneous_layer_cycle_interval": 2, "learning_rate": 1e-4}
FOUR |= {"scan_layers": False, "calculate_per_token_loss": True}
LAST, STEPS = 2, 5  # the step of the checkpoint, and the steps of a whole run
ROWS = 8
TWICE_FOUR_ROWS = {"gradient_accumulation_steps": 2, "per_device_batch_size": ROWS // 2}
EIGHT = {"per_device_batch_size": 1}  # on each of 8 devices
MESHES = {
  "fsdp_tensor_expert": {"ici_fsdp_parallelism": 2, "ici_tensor_parallelism": 2, "ici_expert_parallelism": 2},
  "tensor_data": {"ici_data_parallelism": 4, "ici_tensor_parallelism": 2, "ici_fsdp_parallelism": 1},
}

pytestmark = pytest.mark.slow  # runs of the trainer; test_resume.py has some with `make test`


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("restores")


@pytest.fixture(scope="module")
def data(folder):
  return write_documents(folder) | FOUR | {"per_device_batch_size": ROWS}


@pytest.fixture(scope="module")
def accumulated(folder, data):
  """Three steps of 8 rows and two more of twice 4, and five steps of 8 rows."""
  run(
    folder,
    arguments(folder, "parts", "parts_1", LAST + 1, **data),
    arguments(folder, "parts", "parts_2", STEPS, **data | TWICE_FOUR_ROWS),
    arguments(folder, "straight", "straight", STEPS, **data),
  )
  return folder


def copied(folder, source, name):
  """Gives a new run the checkpoint of another."""
  shutil.copytree(folder / source / "checkpoints" / str(LAST), folder / name / "checkpoints" / str(LAST))
  return name


def assert_goes_on(folder, straight, parts, name=None):
  """All that the steps after the restore report, but gradients; and the biases that are saved at the end.

  Sums in another order round otherwise: float32 has 24 bits, and two steps move no weight by more than 2e-4. Norms of
  gradients differ by 1e-4. Biases differ by updates of 1e-3, or by the rounding of their mean.
  """
  expected, found = metrics(folder, straight), metrics(folder, parts)
  assert sorted(found) == list(range(LAST + 1, STEPS))
  for step, line in found.items():
    compared = {key: value for key, value in line.items() if "grad" not in key}
    assert {"learning/loss", "learning/mtp_loss", "learning/total_weights", "learning/param_norm"} <= set(compared)
    for key, value in compared.items():
      np.testing.assert_allclose(value, expected[step][key], rtol=1e-5, atol=1e-6, err_msg=f"{step} {key}")
  assert expected[LAST + 1]["learning/loss"] != pytest.approx(expected[STEPS - 1]["learning/loss"], rel=1e-3)
  assert_same_biases(checkpoint(folder, straight, STEPS - 1), checkpoint(folder, name or parts, STEPS - 1))


def assert_same_biases(expected, found):
  biases = [path for path in expected if path.endswith("['gate']['bias']")]
  assert len(biases) == 3 + 1
  for path in biases:
    assert np.abs(expected[path]).max() > 0
    np.testing.assert_allclose(found[path], expected[path], rtol=0, atol=1e-9, err_msg=path)


def test_other_accumulation(accumulated):
  """The same documents in the same global batches, in microbatches of half the rows."""
  assert_goes_on(accumulated, "straight", "parts_2", "parts")


def restored(folder, name, **settings):
  """{path as in a checkpoint: array} of the state that MaxText's trainer begins with, of all that is saved but keys."""
  from flax import nnx
  from maxtext.common import train_state_nnx
  from maxtext.configs import pyconfig
  from maxtext.utils import train_utils

  jax.config.update("jax_default_prng_impl", "unsafe_rbg")  # as the trainer does, whose keys have another shape
  config = pyconfig.initialize(["train", *arguments(folder, name, name, STEPS, **settings)])
  state = nnx.state(train_utils.setup_train_loop(config, None)[-1])
  stored = train_state_nnx.to_checkpoint_dict(state)
  return by_path({key: value for key, value in stored.items() if key != "nnx_aux"})


def by_path(tree):
  """Lists and dicts of them are the same in a path."""
  flat = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path).replace("'", ""): np.asarray(leaf) for path, leaf in flat}


def saved(folder, name):
  """A checkpoint, but its keys."""
  whole = checkpoint(folder, name, LAST)
  return {path.replace("'", ""): value for path, value in whole.items() if not path.startswith("['nnx_aux']")}


def items(folder, name):
  return folder / name / "checkpoints" / str(LAST) / "items"


REFUSED = r"(?s)does not match the model:.*missing \(model expects.*Verify .*scan_layers"


def assert_refused_unless_scan_is(folder, source, scan, data):
  """Both ways to a checkpoint of the other layout; MaxText's text names a weight, and scan_layers last."""
  weight = f"decoder/{'scanned_blocks' if scan else 'layers_2'}/"
  name = copied(folder, source, f"{source}_refused")
  for run_name, path in ((name, ""), (f"{name}_weights", items(folder, source))):
    with pytest.raises(ValueError, match=REFUSED) as error:
      restored(folder, run_name, **data | {"scan_layers": scan, "load_parameters_path": path})
    assert f"'{weight}" in str(error.value)


def test_unscanned_weights_are_refused_where_layers_are_scanned(accumulated, data):
  assert_refused_unless_scan_is(accumulated, "parts", True, data)


def test_scanned_weights_are_refused_where_layers_are_not(folder, data):
  run(folder, arguments(folder, "scanned", "scanned", LAST + 1, **data | {"scan_layers": True}))
  assert_refused_unless_scan_is(folder, "scanned", False, data)


def assert_rounded(expected, found, kept=()):
  """bfloat16, rounded to the nearest, ties to even, but integers and what ends with `kept`."""
  assert set(found) == set(expected)
  for path, value in expected.items():
    if value.dtype == np.float32 and not path.endswith(kept):
      assert found[path].dtype == ml_dtypes.bfloat16, path
      value = rounded(value)
    np.testing.assert_array_equal(found[path].astype(np.float32), value.astype(np.float32), err_msg=path)


def rounded(value):
  """The upper 16 bits of float32, after half of the lower ones is added: to even where they are just half."""
  bits = value.view(np.uint32)
  return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


BIAS = "[gate][bias]"
BFLOAT16 = {"weight_dtype": "bfloat16"}


def test_bfloat16_from_float32(accumulated, data):
  """Weights and Adam's moments are rounded; biases are float32, as routed_bias_dtype says, and step and counts go on."""
  expected = saved(accumulated, "parts")
  found = restored(accumulated, copied(accumulated, "parts", "bfloat16"), **data | BFLOAT16)
  assert_rounded(expected, found, kept=BIAS)
  assert int(found["[step]"]) == LAST + 1
  for part in ("[params]", "[mu]", "[nu]"):
    assert any(part in path and np.abs(value).max() > 0 for path, value in found.items())
  assert all(value.dtype == np.float32 for path, value in found.items() if path.endswith(BIAS))


def test_bfloat16_biases_from_float32(accumulated, data):
  """Where routed_bias_dtype is empty, the dtype of biases is that of weights."""
  name = copied(accumulated, "parts", "bfloat16_biases")
  assert_rounded(saved(accumulated, "parts"), restored(accumulated, name, **data | BFLOAT16, routed_bias_dtype=""))


@pytest.mark.parametrize("way", ["load_full_state_path", "load_parameters_path"])
def test_bfloat16_from_a_path(accumulated, data, way):
  """A full state is as after a restore; with weights alone the optimizer begins at zero."""
  expected = saved(accumulated, "parts")
  if way == "load_parameters_path":
    expected |= {path: np.zeros_like(value) for path, value in expected.items() if not path.startswith("[params]")}
  found = restored(accumulated, way, **data | BFLOAT16 | {way: items(accumulated, "parts")})
  assert_rounded(expected, found, kept=BIAS)


@pytest.fixture(scope="module")
def eight(folder, data):
  """Five steps of 8 devices, saved after the third."""
  settings = data | EIGHT | {"ici_fsdp_parallelism": 8, "checkpoint_period": LAST}
  run(folder, arguments(folder, "eight", "eight", STEPS, **settings), **devices(8))
  return folder


@pytest.mark.mesh
def test_other_meshes(eight, data):
  names = [copied(eight, "eight", name) for name in MESHES]
  runs = [arguments(eight, name, name, STEPS, **data | EIGHT | MESHES[name]) for name in names]
  run(eight, *runs, **devices(8))
  for name in names:
    assert_goes_on(eight, "eight", name)


@pytest.mark.mesh
def test_one_device_after_eight(eight, data):
  run(
    eight,
    arguments(eight, copied(eight, "eight", "one"), "one", STEPS, **data),
    arguments(eight, copied(eight, "eight", "one_twice"), "one_twice", STEPS, **data | TWICE_FOUR_ROWS),
  )
  assert_goes_on(eight, "eight", "one")
  assert_goes_on(eight, "eight", "one_twice")


@pytest.fixture
def own_address(monkeypatch):
  """MaxText's port is fixed; test_two_processes.py may run at the same time, at another address."""
  own = {"JAX_COORDINATOR_ADDRESS": "127.0.0.2", "JAX_COORDINATOR_BIND_ADDRESS": "127.0.0.2:1234"}
  monkeypatch.setattr(test_two_processes, "start", lambda *words, **others: start(*words, **others | own))


@pytest.mark.mesh
@pytest.mark.usefixtures("own_address")
def test_two_processes_after_one(eight, data):
  """Refused, as each process saves its own place in the data, but where MaxText's setting has one process read all."""
  settings = data | EIGHT | {"ici_fsdp_parallelism": 8, "ici_tensor_parallelism": 1}
  refused = start_two(eight, copied(eight, "eight", "two_refused"), STEPS, **settings)
  for process in refused:
    output, _ = process.communicate(timeout=test_two_processes.DEADLINE)
    assert process.returncode != 0
    assert "stored checkpoint files (1) is incompatible with the number of JAX processes (2)" in output
  finished(start_two(eight, copied(eight, "eight", "two"), STEPS, **settings, expansion_factor_real_data=2))
  assert_goes_on(eight, "eight", "two_0", "two")


def test_one_process_after_two_is_refused(accumulated, data):
  """Two files of places in the documents, as two processes save them."""
  name = copied(accumulated, "parts", "one_after_two")
  places = items(accumulated, name).parent / "iter"
  for index in range(2):
    shutil.copy(places / "process_0-of-1.json", places / f"process_{index}-of-2.json")
  (places / "process_0-of-1.json").unlink()
  with pytest.raises(AssertionError, match="2 processes found .* only 1 jax processes .* expansion_factor_real_data"):
    restored(accumulated, name, **data)
