"""Prints what `model_name=ling2-tiny` is after MaxText's configuration was imported again: run by test_reload.py."""

import importlib
import os

import maxtext.configs.pyconfig as pyconfig

for _ in range(2):
  pyconfig = importlib.reload(pyconfig)
base = os.path.join(pyconfig.MAXTEXT_CONFIGS_DIR, "base.yml")
words = [
  "hardware=cpu",
  "skip_jax_distributed_system=true",
  "run_name=a",
  "log_config=false",
  "enable_checkpointing=false",
]
config = pyconfig.initialize(["", base, "model_name=ling2-tiny", *words])
print("RESULT", config.decoder_block.value, config.group_norm_size)
stock = pyconfig.initialize(["", base, "model_name=llama2-7b", *words])
print("RESULT", stock.decoder_block.value)
