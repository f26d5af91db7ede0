"""Blocks of any shape: what is filled from Hugging Face tensors goes back into them, also where a block cuts rows."""

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
def test_fill_and_spill(tmp_path, model, cut):
  config, weights = model
  entries = [(name, entry.hf_shape, np.dtype(np.float32)) for entry in mapping.entries(config) for name in entry.names]
  with safetensors_file.create(tmp_path / "model.safetensors", entries) as new:
    for leaf in stacking.leaves(config):
      if cut == "ones" and np.prod(leaf.shape) > 2000:
        shape = tuple(max(1, size // 2) for size in leaf.shape)
      else:
        shape = tuple(max(1, size // {"whole": 1, "halves": 2, "thirds": 3, "ones": 10**6}[cut]) for size in leaf.shape)
      for box in blocks.boxes(leaf.shape, shape):
        block = blocks.fill(leaf, box, weights.__getitem__, np.dtype(np.float32))
        expected = leaf.assemble(lambda entry: entry.to_maxtext([weights[name] for name in entry.names]))[box]
        np.testing.assert_array_equal(block, expected)
        blocks.spill(leaf, box, block, new.__getitem__)
  folders.assert_equal(folders.read(tmp_path), weights)


def test_blocks_are_whole_tensors_where_they_fit_else_whole_rows(model):
  config, _ = model
  for leaf in stacking.leaves(config):
    for limit in (200, 2000, 10**9):
      shape = blocks.block_shape(leaf, 4, limit)
      covered = np.zeros(leaf.shape, np.int8)
      for box in blocks.boxes(leaf.shape, shape):
        covered[box] += 1
      assert (covered == 1).all()
      assert np.prod(shape) * 4 <= max(limit, 4 * max(leaf.members[0][0].hf_shape[1:], default=1) * 20)
    assert blocks.block_shape(leaf, 4, 10**9) == leaf.shape


def test_bits_of_nan_survive(model):
  config, weights = model
  leaf = next(leaf for leaf in stacking.leaves(config) if leaf.path[-1] == "wi_0")
  name = leaf.members[0][0].names[0]
  odd = weights[name].copy()
  odd.view(np.uint32)[0, 0] = 0x7FA0_0001  # a signalling NaN with a payload
  box = tuple(slice(0, size) for size in leaf.shape)
  block = blocks.fill(leaf, box, (weights | {name: odd}).__getitem__, np.dtype(np.float32))
  assert 0x7FA0_0001 in block.view(np.uint32)
