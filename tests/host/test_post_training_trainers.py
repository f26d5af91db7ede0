"""DPO by tunix: the step that LING2 puts in its place, on a stand-in for tunix's trainer."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from handlers import wrapped

from maxtext_ling2.configs.post_training import DISTILLATION, DPO
from maxtext_ling2.errors import Ling2Error
from maxtext_ling2.host.seams import engine_quantization, post_training
from maxtext_ling2.host.seams.post_training import PostTrainingSeam


class Sowing(nnx.Module):
  """y = w x, which sows and counts in each call, as a model with experts does."""

  def __init__(self):
    self.w = nnx.Param(jnp.array([2.0, -1.0]))
    self.calls = nnx.BatchStat(jnp.array(0))

  def __call__(self, x):
    self.sow(nnx.Intermediate, "seen", x)
    self.calls[...] += 1
    return self.w[...] * x


def trainer_class():
  class DPOTrainer:
    ref_model = None

    def create_train_step_fn(self):
      raise AssertionError("tunix's step")

    def _train_step(self, model, optimizer, inputs):
      raise AssertionError("tunix's step")

    def train(self, batches, cache_nnx_graph=True):
      return batches, cache_nnx_graph

    def _prepare_inputs(self, inputs):
      return self.ref_model(inputs)

  return DPOTrainer


@pytest.fixture
def tunix(monkeypatch):
  """A module in tunix's place."""
  module = types.ModuleType("tunix.sft.dpo.dpo_trainer")
  module.DPOTrainer = trainer_class()
  for name in ("tunix", "tunix.sft", "tunix.sft.dpo"):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  monkeypatch.setitem(sys.modules, module.__name__, module)
  return module


def test_the_step_is_that_of_the_closed_form(tunix):
  seam = PostTrainingSeam()
  seam._replace_step()
  trainer = tunix.DPOTrainer()
  trainer.gen_model_input_fn = lambda x: {"x": x, "factor": "3"}
  trainer.loss_fn = lambda model, x, factor: (int(factor) * jnp.sum(model(x) ** 2), {"calls": model.calls[...]})
  model = Sowing()
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
  step = nnx.jit(trainer.create_train_step_fn())
  x, w = np.array([1.0, 2.0]), np.array([2.0, -1.0])
  for number in (1, 2):
    loss, aux, norm = step(model, optimizer, jnp.asarray(x))
    gradient = 6 * w * x * x
    np.testing.assert_allclose(loss, 3 * np.sum((w * x) ** 2), rtol=1e-6)
    np.testing.assert_allclose(norm, np.linalg.norm(gradient), rtol=1e-6)
    w = w - 0.1 * gradient
    np.testing.assert_allclose(model.w[...], w, rtol=1e-6)
    assert aux["calls"] == number == model.calls[...]
    assert not jax.tree.leaves(nnx.state(model, nnx.Intermediate))


def test_tunix_keeps_no_graph_and_the_reference_model_does_not_grow(tunix):
  seam = PostTrainingSeam()
  seam._replace_step()
  seam._replace_step()  # a second model of the same run
  trainer = tunix.DPOTrainer()
  assert trainer.train("batches") == ("batches", False)
  trainer.ref_model = Sowing()
  for _ in range(2):
    np.testing.assert_array_equal(trainer._prepare_inputs(jnp.array([1.0, 1.0])), [2.0, -1.0])
    assert not jax.tree.leaves(nnx.state(trainer.ref_model, nnx.Intermediate))
  assert seam.patches.undo() == []
  assert trainer.train("batches") == ("batches", True)


def test_another_tunix_is_named(tunix):
  del tunix.DPOTrainer._prepare_inputs
  with pytest.raises(Ling2Error, match="DPOTrainer has no _prepare_inputs, .*; install google-tunix 0.1.7"):
    PostTrainingSeam()._replace_step()


class OldManager:
  def __init__(self):
    self._checkpoint_manager = None


class NewManager:
  def __init__(self):
    self._checkpointer = None


def test_distillation_needs_another_tunix_before_weights_are_loaded(tunix, monkeypatch):
  module = types.ModuleType("tunix.sft.checkpoint_manager")
  monkeypatch.setitem(sys.modules, module.__name__, module)
  monkeypatch.setattr(post_training, "running_trainer", lambda: DISTILLATION)
  monkeypatch.setattr(post_training.post_training, "check", lambda config, trainer: None)
  loaded = []
  call = types.SimpleNamespace(config=None, original=lambda: loaded.append(1))
  module.CheckpointManager = OldManager
  with pytest.raises(Ling2Error, match="distillation: tunix's CheckpointManager sets no _checkpointer"):
    PostTrainingSeam()._load(call)
  assert not loaded
  module.CheckpointManager = NewManager
  PostTrainingSeam()._load(call)
  assert loaded


def engine(**settings):
  """What MaxEngine's constructor answers for a LING2 config with these settings."""
  defaults = {"quantization": "", "use_qwix_quantization": False, "save_quantized_params_path": ""}
  config = types.SimpleNamespace(**{"decoder_block": "ling2"} | defaults | settings)
  return wrapped(engine_quantization._check, lambda config: "an engine")(config)


def test_maxengine_takes_no_weights_of_aqt():
  with pytest.raises(ValueError, match=r"quantization='int8': MaxEngine of MaxText .*'quant_einsum_wi_0'"):
    engine(quantization="int8")
  assert engine() == "an engine" == engine(quantization="int8", decoder_block="mixtral")
  with pytest.raises(
    ValueError, match="save_quantized_params_path=/out: MaxEngine of MaxText 0.2.5 .* saves nothing there"
  ):
    engine(quantization="int8", save_quantized_params_path="/out")
  assert engine(quantization="int8", use_qwix_quantization=True) == "an engine"


@pytest.mark.parametrize("trainer", [DPO, None])
def test_the_step_is_replaced_for_dpo_alone(tunix, monkeypatch, trainer):
  monkeypatch.setattr(post_training, "running_trainer", lambda: trainer)
  monkeypatch.setattr(post_training.post_training, "check", lambda config, trainer: None)
  call = types.SimpleNamespace(config=None, original=lambda: "model")
  assert PostTrainingSeam()._load(call) == "model"
  replaced = tunix.DPOTrainer.create_train_step_fn is post_training._train_step_function
  assert replaced == (trainer == DPO)
