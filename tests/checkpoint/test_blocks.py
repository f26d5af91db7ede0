"""Blocks of any shape: what is read from Hugging Face tensors is written back, also where a block splits rows."""

import folders
import numpy as np
import pytest

from maxtext_ling2.checkpoint import blocks, mapping, safetensors_file, stacking, stock_tables

pytestmark = pytest.mark.unit

SETTINGS = {"scan_layers": True, "enable_routed_bias_grad": False}


@pytest.fixture(scope="module")
def model():
  raw = folders.TINY | {"num_nextn_predict_layers": 1}
  from maxtext_ling2.checkpoint import hf_config

  config = stock_tables.structure({**hf_config.to_maxtext(raw), **SETTINGS})
  return config, folders.weights(raw, "F32")


@pytest.mark.parametrize("cut", ["whole", "halves", "thirds", "ones"])
def test_read_and_write(tmp_path, model, cut):
  config, weights = model
  entries = [(name, entry.hf_shape, np.dtype(np.float32)) for entry in mapping.entries(config) for name in entry.names]
  with safetensors_file.create(tmp_path / "model.safetensors", entries) as new:
    for leaf in stacking.leaves(config):
      expected = folders.stacked(leaf, weights.__getitem__)
      if cut == "ones" and np.prod(leaf.shape) > 2000:
        shape = tuple(max(1, size // 2) for size in leaf.shape)
      else:
        shape = tuple(max(1, size // {"whole": 1, "halves": 2, "thirds": 3, "ones": 10**6}[cut]) for size in leaf.shape)
      for block in blocks.block_slices(leaf.shape, shape):
        values = blocks.read_block(leaf, block, weights.__getitem__, np.dtype(np.float32))
        np.testing.assert_array_equal(values, expected[block])
        blocks.write_block(leaf, block, values, new.__getitem__)
  folders.assert_equal(folders.read(tmp_path), weights)


def test_blocks_are_whole_tensors_where_they_fit_else_whole_rows(model):
  config, _ = model
  for leaf in stacking.leaves(config):
    for limit in (200, 2000, 10**9):
      shape = blocks.block_shape(leaf, 4, limit)
      covered = np.zeros(leaf.shape, np.int8)
      for block in blocks.block_slices(leaf.shape, shape):
        covered[block] += 1
      assert (covered == 1).all()
      assert np.prod(shape) * 4 <= max(limit, 4 * max(leaf.first.hf_shape[1:], default=1) * 20)
    assert blocks.block_shape(leaf, 4, 10**9) == leaf.shape


def test_bits_of_nan_survive(model):
  config, weights = model
  leaf = next(leaf for leaf in stacking.leaves(config) if leaf.path[-1] == "wi_0")
  name = leaf.first.names[0]
  odd = weights[name].copy()
  odd.view(np.uint32)[0, 0] = 0x7FA0_0001  # a signalling NaN with a payload
  block = blocks.stack(leaf, (weights | {name: odd}).__getitem__)
  assert 0x7FA0_0001 in block.view(np.uint32)


@pytest.mark.parametrize("num_axes", [0, 1, 2])
def test_stack_and_unstack_whole_leaves(model, num_axes):
  config, weights = model
  found = [leaf for leaf in stacking.leaves(config) if leaf.num_stacked_axes == num_axes]
  assert len(found) > 5
  for leaf in found:
    whole = blocks.stack(leaf, weights.__getitem__)
    np.testing.assert_array_equal(whole, folders.stacked(leaf, weights.__getitem__))
    names = list(leaf.names)
    tensors = dict(blocks.unstack(leaf, whole))
    assert set(tensors) == set(names) == set(folders.unstacked({leaf: whole}))
    folders.assert_equal(tensors, {name: weights[name] for name in names})


def test_stack_takes_the_dtype_that_holds_all_tensors(model):
  config, weights = model
  leaf = next(leaf for leaf in stacking.leaves(config) if leaf.path[-1] == "wi_0")
  narrow = {name: weights[name].astype(folders.DTYPES["BF16"]) for name in leaf.names}
  assert blocks.stack(leaf, narrow.__getitem__).dtype == folders.DTYPES["BF16"]
  mixed = narrow | {leaf.first.names[0]: weights[leaf.first.names[0]]}
  whole = blocks.stack(leaf, mixed.__getitem__)
  assert whole.dtype == np.float32
  np.testing.assert_array_equal(whole, folders.stacked(leaf, mixed.__getitem__))


def test_stacking_needs_no_cpu_device(model, monkeypatch):
  """With JAX_PLATFORMS=tpu there is none, and numpy transposes."""
  config, weights = model
  monkeypatch.setattr(blocks, "_SMALL", 0)  # XLA transposes small arrays too
  by_xla = [blocks.stack(leaf, weights.__getitem__) for leaf in stacking.leaves(config)]
  monkeypatch.setattr(blocks, "_cpu_device", lambda: None)
  for leaf, expected in zip(stacking.leaves(config), by_xla, strict=True):
    assert blocks.stack(leaf, weights.__getitem__).tobytes() == expected.tobytes()
