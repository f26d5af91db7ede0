"""The recipes of a pre-training: the values of the script that the model comes from, and what ours changes."""

import numpy as np
import yaml

from maxtext_ling2.host.compile_step import read_config
from maxtext_ling2.maxtext_api import recipes

QUIET = [
  "hardware=cpu",
  "skip_jax_distributed_system=true",
  "run_name=a",
  "log_config=false",
  "grain_train_files=index|data",
]
ORIGIN = {
  "opt_type": "adamw",
  "adam_b1": 0.9,
  "adam_b2": 0.95,
  "adam_weight_decay": 0.1,
  "gradient_clipping_threshold": 1.0,
  "learning_rate": 3.36e-4,
  "learning_rate_final_fraction": 1.0,
  "moe_z_loss_weight": 3.5e-6,
  "gradient_accumulation_steps": 1,
  "mmap_eod_id": 156892,
  "pad_id": 156892,
  "reset_attention_mask": False,
  "eod_mask_loss": True,
  "add_bos": False,
}


def resolved(recipe):
  return read_config(str(recipes.file_of(recipe)), QUIET).get_keys()


def test_values_and_differences():
  origin, ours = map(resolved, ("pretrain_ling2", "pretrain_ling2_recommended"))
  assert {key: origin[key] for key in ORIGIN} == ORIGIN
  assert origin["warmup_steps_fraction"] * origin["learning_rate_schedule_steps"] == 250
  said = set(yaml.safe_load(recipes.file_of("pretrain_ling2_recommended").read_text()))
  different = {key for key, value in origin.items() if ours[key] != value}
  derived = {key for key in different - said if "batch" in key}  # of the microbatches
  assert different - derived == said


def test_the_rate_is_constant_behind_the_warm_up():
  from maxtext.utils import maxtext_utils

  for recipe, last in (("pretrain_ling2", 3.36e-4), ("pretrain_ling2_recommended", 3.36e-5)):
    rate = maxtext_utils.create_learning_rate_schedule(read_config(str(recipes.file_of(recipe)), QUIET))
    assert float(rate(250)) == np.float32(3.36e-4) and abs(float(rate(99_999)) - last) < 1e-8
