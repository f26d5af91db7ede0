"""The export's config.json read by vLLM's own loader, as `vllm serve --trust-remote-code` reads it. No model is built."""

import os

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from rows import folders, not_run, row, row_of_all, wrong_sizes

try:
  import vllm
  import vllm.config  # first, or the imports below go round in a circle
  from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS
  from vllm.transformers_utils.config import get_config
  from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase
except ImportError as error:
  not_run(error)


def other_model(config):
  """What vLLM would build, if it is not this model with latent attention."""
  module, _ = _TEXT_GENERATION_MODELS.get(config.architectures[0], ("no model", None))
  if module != "bailing_moe_linear":
    return module
  return "" if ModelArchConfigConvertorBase(config, config).convert().is_deepseek_mla else "no latent attention"


configs = [(folder, get_config(folder.path, trust_remote_code=True)) for folder in folders("exported", "saved")]
wrong = [(folder, wrong_sizes(folder, config)) for folder, config in configs]
row_of_all(vllm.__version__, "config.json, by its loader with trust", "none", wrong)
wrong = [(folder, other_model(config)) for folder, config in configs]
row_of_all(vllm.__version__, "model that it chooses", "bailing_moe_linear", wrong)
native = type(get_config(folders("exported")[0].path, trust_remote_code=False))
row(vllm.__version__, "exported: its loader without trust", native.__name__, None)
