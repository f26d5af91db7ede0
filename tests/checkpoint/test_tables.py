"""MaxText's conversion tables, asked as MaxText's tools ask them, and the sizes of the models."""

import folders
import jax
import numpy as np
import pytest
from flax import nnx

from maxtext_ling2 import plugin
from maxtext_ling2.checkpoint import hf_config, stacking, stock_tables
from maxtext_ling2.checkpoint.hf_checkpoint import HfCheckpoint
from maxtext_ling2.maxtext_api import session

# (all without MTP, MTP): the published totals; the MTP layer to the digits that are published.
SIZES = {
  "ling2": (16_595_941_120, 0.836e9),
  "ling2.6-flash": (104_186_915_584, 3.307e9),
  "ling2.5-1t": (1_012_231_160_320, 13.18e9),
}


def parameter_count(config):
  return sum(int(np.prod(leaf.shape)) for leaf in stacking.leaves(config))


def count(model_name, **settings):
  """Parameters and router biases of MaxText's own model, of which no weight is made."""
  config = session.make_config(model_name=model_name, **settings)
  state = nnx.state(session._abstract_model(config, session.make_mesh(config), 0))
  held = [variable.get_value() for _, variable in nnx.to_flat_state(state) if session._holds_weights(variable)]
  assert sum(int(np.prod(value.shape)) for value in held) == parameter_count(config)
  return parameter_count(config)


@pytest.mark.parametrize("model_name", SIZES)
def test_parameter_counts(model_name):
  total, mtp = SIZES[model_name]
  assert count(model_name, mtp_num_layers=0, scan_layers=True) == total
  with_mtp = parameter_count(session.make_config(model_name=model_name))
  assert with_mtp - total == pytest.approx(mtp, rel=5e-4)


@pytest.mark.parametrize(
  ("case", "scan"),
  [
    pytest.param("trailing_mtp", True, id="trailing_mtp-scanned"),
    pytest.param("trailing_mtp", False, id="trailing_mtp-unscanned", marks=pytest.mark.slow),
    pytest.param("one_cycle", True, id="one_cycle-scanned", marks=pytest.mark.slow),
    pytest.param("one_cycle", False, id="one_cycle-unscanned", marks=pytest.mark.slow),
  ],
)
def test_maxtexts_own_way_through_the_tables(case, scan):
  """What stock to_maxtext and to_huggingface compute with our entries, one tensor at a time."""
  from maxtext.checkpoint_conversion import to_maxtext
  from maxtext.checkpoint_conversion.utils import hf_shape, param_mapping, utils

  plugin.REGISTRY.complete()
  folder = folders.GOLDEN / case
  raw, config = hf_config.read(folder), folders.config(folder, scan_layers=scan)
  names = param_mapping.PARAM_MAPPING["ling2-custom"](raw, config, scan)
  forth = param_mapping.HOOK_FNS["ling2-custom"](raw, config, scan, saving_to_hf=False)
  back = param_mapping.HOOK_FNS["ling2-custom"](raw, config, scan, saving_to_hf=True)
  shapes = hf_shape.HF_SHAPE["ling2-custom"](raw)
  abstract, _ = to_maxtext.get_maxtext_model_info(config)
  assert set(names) == set(abstract) == set(forth)
  returned, expected = {}, set()
  with HfCheckpoint(folder) as tensors:
    for leaf in stacking.leaves(config):
      key = leaf.table_key
      assert abstract[key][1] == leaf.shape
      if leaf.keeps_dtype and leaf.num_stacked_axes == 2:
        continue  # MaxText's generic code stacks no other collection in a nested scan
      load = to_maxtext._get_hf_loading_function(names[key], tensors.__getitem__, forth[key], leaf.shape, config, key)
      value = load()
      np.testing.assert_array_equal(value, folders.stacked(leaf, tensors.__getitem__), err_msg=key)
      # On the way back MaxText's generic code takes any plain list in a scanned model for layers, also one of experts.
      if not leaf.keeps_dtype and not (scan and leaf.num_stacked_axes == 0 and leaf.stacked_axes):
        parts = utils.process_maxtext_param(key, jax.numpy.asarray(value), names, back, shapes, config)
        returned |= dict(parts)
        expected |= set(leaf.names)
  source = folders.read(folder)
  assert set(returned) == expected and len(expected) > 50
  for name, value in returned.items():
    np.testing.assert_array_equal(value, source[name], err_msg=name)


def test_every_model_has_every_table():
  from maxtext.checkpoint_conversion.utils import hf_model_configs, hf_shape, param_mapping
  from maxtext.utils import globals as maxtext_globals

  plugin.REGISTRY.complete()
  tables = (param_mapping.PARAM_MAPPING, param_mapping.HOOK_FNS, hf_shape.HF_SHAPE, hf_model_configs.HF_MODEL_CONFIGS)
  for model_name in plugin.MODEL_NAMES:
    assert all(model_name in table for table in (*tables, maxtext_globals.HF_IDS))
  assert maxtext_globals.HF_IDS["ling2.6-flash"] == "inclusionAI/Ling-2.6-flash"
  assert "ling2" in plugin.MODEL_NAMES and len(plugin.MODEL_NAMES) == 5


@pytest.mark.parametrize("model_name", ["ling2", "ling2-tiny", "ling2.6-flash", "ling2.5-1t"])
def test_config_json_of_each_model_gives_its_settings_back(model_name):
  written = stock_tables.HfModelConfig(plugin.CONFIGS / "models" / f"{model_name}.yml").to_dict()
  config = session.make_config(model_name=model_name)
  for field, value in hf_config.to_maxtext(written).items():
    if field not in ("shared_experts", "moe_shared_expert_dim"):
      found = getattr(config, field)
      assert getattr(found, "value", found) == value, field
  assert hf_config.shared_width(config) == written["num_shared_experts"] * written["moe_intermediate_size"]
  shapes = stock_tables.hf_shapes(written)
  assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameter_count(config)


def test_shared_width_of_four_experts():
  written = stock_tables.HfModelConfig(plugin.CONFIGS / "models" / "ling2.yml").to_dict()
  assert (written["num_shared_experts"], written["moe_intermediate_size"]) == (4, 512)
  assert written["architectures"] == ["BailingMoeV2_5ForCausalLM"] and "auto_map" not in written


@pytest.mark.parametrize(("mtp", "count"), [(1, 343), (0, 322)])
def test_numbers_of_tensors_of_ling2(mtp, count):
  """The RFC's, by shapes alone: of MaxText's checkpoint, and 15643 of the Hugging Face folder with MTP."""
  leaves = list(stacking.leaves(session.make_config(model_name="ling2", mtp_num_layers=mtp, override_model_config=True)))
  assert len(leaves) == count
  names = {name for leaf in leaves for name in leaf.names}
  assert len(names) == {1: 15643, 0: 14857}[mtp]
