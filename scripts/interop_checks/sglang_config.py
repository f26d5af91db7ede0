"""The export's config.json read by SGLang's own loader and configuration class. No model is built.

SGLang's configurations import torchvision and triton, which nothing here uses; stand-ins take their place.
"""

import importlib.machinery
import logging
import sys
import types
from unittest import mock

import torch  # noqa: F401  before the stand-ins, so that it does not look for triton
import transformers  # noqa: F401
from rows import folders, not_run, row_of_all, wrong_sizes

STAND_INS = ("torchvision", "triton")


class StandIn(types.ModuleType):
  """A module that has every name."""

  __path__ = ()
  __version__ = "0"

  def __getattr__(self, name):
    if name.startswith("__"):
      raise AttributeError(name)
    return mock.MagicMock(name=name)


class Finder:
  """Finds the stand-ins; only asked for what is not installed."""

  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in STAND_INS:
      return importlib.machinery.ModuleSpec(name, self, is_package=True)
    return None

  def create_module(self, spec):
    return StandIn(spec.name)

  def exec_module(self, module):
    pass


sys.meta_path.append(Finder())
logging.disable(logging.WARNING)
try:
  from sglang.srt.utils.hf_transformers import get_config
  from sglang.version import __version__
except ImportError as error:
  not_run(error)


def wrong_layers(folder, config):
  """What of the layers' types is not by LING2's rule."""
  layers, cycle = folder.expected["num_hidden_layers"], folder.expected["layer_group_size"]
  mla = [(i + 1) % cycle == 0 or i >= layers // cycle * cycle for i in range(layers)]
  expected = ["attention" if is_mla else "linear_attention" for is_mla in mla]
  return ("" if config.layers_block_type == expected else str(config.layers_block_type)) + "KDA" * config.use_kda


def read(folder):
  """The configuration as the server reads it, with and without trust_remote_code, and what is wrong with them."""
  configs = [get_config(str(folder.path), trust_remote_code=trust) for trust in (False, True)]
  others = [type(config).__name__ for config in configs if type(config).__name__ != "BailingHybridConfig"]
  return configs[1], ", ".join([*others, *filter(None, (wrong_sizes(folder, config) for config in configs))])


found = [(folder, *read(folder)) for folder in folders("exported", "saved")]
row_of_all(
  __version__, "config.json, by its BailingHybridConfig", "none", [(folder, wrong) for folder, _, wrong in found]
)
layers = [(folder, wrong_layers(folder, config)) for folder, config, _ in found]
row_of_all(__version__, "type of each layer, no KDA", "none", layers)
