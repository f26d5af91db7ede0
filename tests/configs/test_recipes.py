"""The recipes of a pre-training: the values of the script that the model comes from, and what ours changes."""

import re

import numpy as np
import pytest
import yaml

from maxtext_ling2.host.compile_step import read_config
from maxtext_ling2.host.seams.checkpoint_report import checkpoint_bytes
from maxtext_ling2.maxtext_api import recipes
from maxtext_ling2.training.checkpoint_report import readable

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


SAID = re.compile(r"one has (.*?) \(weights and AdamW's two moments in float32\)")


def said_size(recipe):
  return SAID.search(recipes.file_of(recipe).read_text())[1]


@pytest.mark.parametrize("recipe", [*recipes.names(), *recipes.trainings()])
def test_every_recipe_keeps_the_last_checkpoints(recipe):
  keys = resolved(recipe)
  assert keys["checkpoint_period"] == 1000 and keys["max_num_checkpoints_to_keep"] == 3
  if recipe != "pretrain_ling2_recommended":  # which is pretrain_ling2 but for its own lines
    assert said_size(recipe) == {"ling2": "209 GB", "ling2.6-flash": "1.29 TB"}[keys["model_name"]]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["pretrain_ling2", "ling2.6-flash-v5p-256"])
def test_the_bytes_of_a_checkpoint_are_as_the_recipe_says(recipe):
  """Counted from the abstract training state."""
  from flax import nnx
  from maxtext.common import train_state_nnx
  from maxtext.utils import maxtext_utils, model_creation_utils, train_utils

  config = read_config(str(recipes.file_of(recipe)), QUIET)
  mesh = maxtext_utils.get_mesh_from_config(config)
  create, model = model_creation_utils.create_nnx_abstract_model(config, mesh)
  _, optimizer = train_utils.create_training_optimizer(config, model, mesh=mesh)

  def state():
    model = create()
    return train_state_nnx.TrainStateNNX(model, nnx.Optimizer(model, optimizer, wrt=nnx.Param))

  assert readable(checkpoint_bytes(nnx.eval_shape(state), config)) == said_size(recipe)
