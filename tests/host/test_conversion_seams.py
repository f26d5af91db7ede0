"""The conversion seams pass everything through that is not one of the plugin's models."""

import types

import pytest
from handlers import wrapped
from maxtext.checkpoint_conversion.utils import utils

from maxtext_ling2 import plugin
from maxtext_ling2.host.contract import CommandExpectation
from maxtext_ling2.host.seams.to_huggingface import ToHuggingFaceSeam
from maxtext_ling2.host.seams.to_maxtext import Request, ToMaxTextSeam


def refuse(*arguments):
  raise AssertionError(f"called with {arguments}")


def config(block, **settings):
  lora = types.SimpleNamespace(lora_restore_path="")
  return types.SimpleNamespace(decoder_block=block, lora=lora, load_parameters_path="p", **settings)


def save(maxtext_model_path, jax_weights, device_count, use_ocdbt, use_zarr3, config):
  """With the parameters of MaxText's."""
  return "MaxText", maxtext_model_path, jax_weights, device_count, use_ocdbt, use_zarr3


@pytest.mark.parametrize("block", ["llama2", "deepseek"])
def test_another_model_is_saved_by_maxtext(block):
  seam = ToMaxTextSeam(refuse, refuse)
  seam.request = Request("folder", "float32")
  saved = wrapped(seam._save, save)("out", {"a": 1}, 16, True, False, config=config(block))
  assert saved == ("MaxText", "out", {"a": 1}, 16, True, False)


def test_ling2_is_saved_by_us_only_for_the_command():
  seam = ToMaxTextSeam(refuse, lambda *arguments: arguments)
  saved = wrapped(seam._save, save)
  ours = config("ling2")
  assert saved("/out", {}, 1, True, False, ours) == ("MaxText", "/out", {}, 1, True, False)
  seam.request = Request("folder", "float32")
  assert saved("/out", {}, 1, True, False, ours) == ("folder", ours, "/out/0", "float32", "", True, False)
  assert saved("gs://b/out", {}, 1, True, False, ours)[0] == "MaxText"  # the command saves once


def test_other_models_are_exported_by_maxtext():
  seam = ToHuggingFaceSeam(refuse)
  assert seam._load(lambda config: "loaded", config("llama2")) == "loaded"
  assert seam._extract(lambda value: ("extracted", value), {"params": 1}) == ("extracted", {"params": 1})
  assert seam._process(lambda *arguments: arguments, "key", "weight", 1, 2) == ("key", "weight", 1, 2)
  assert seam._save(lambda *arguments: arguments, {"a": 1}, "c", "t", "p", "out") == ({"a": 1}, "c", "t", "p", "out")


def test_a_command_is_looked_up_without_importing_it():
  import sys

  before = set(sys.modules)
  found = CommandExpectation("maxtext.checkpoint_conversion.to_huggingface:main", parameters=("argv",)).found()
  assert found is None
  assert "maxtext.checkpoint_conversion.to_huggingface" not in set(sys.modules) - before


def test_the_tables_are_given_back():
  from maxtext.checkpoint_conversion.utils import param_mapping
  from maxtext.utils import globals as maxtext_globals

  plugin.REGISTRY.complete()
  assert "ling2" in maxtext_globals.HF_IDS and utils.save_weights_to_checkpoint.__wrapped__
  assert plugin.REGISTRY.undo() == []
  try:
    assert "ling2" not in maxtext_globals.HF_IDS and "ling2" not in param_mapping.PARAM_MAPPING
    assert not hasattr(utils.save_weights_to_checkpoint, "__wrapped__")
  finally:
    plugin.REGISTRY.install()
    plugin.REGISTRY.complete()
  assert "ling2" in maxtext_globals.HF_IDS and plugin.REGISTRY.usable
