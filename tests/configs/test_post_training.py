"""What each of MaxText's trainers after pre-training does not compute is refused by name, or said."""

import logging
import sys
import types
from types import SimpleNamespace

import pytest

from maxtext_ling2.configs import post_training
from maxtext_ling2.configs.post_training import DISTILLATION, DPO, NATIVE, RL, SFT
from maxtext_ling2.host.trainer import running_trainer

pytestmark = pytest.mark.unit


def config(lora=False, z_loss=0.0, balancing=0.0, mtp=0, qtype=None, scan=True):
  return SimpleNamespace(
    lora=SimpleNamespace(enable_lora=lora, lora_weight_qtype=qtype),
    scan_layers=scan,
    moe_z_loss_weight=z_loss,
    routed_bias=True,
    routed_bias_update_rate=balancing,
    mtp_num_layers=mtp,
  )


def problems(trainer, **settings):
  return list(post_training.problems(config(**settings), trainer))


@pytest.mark.parametrize("trainer", [SFT, DPO, DISTILLATION])
def test_a_loss_without_z_loss_refuses_its_weight(trainer):
  (text,) = problems(trainer, z_loss=1e-3)
  assert text.startswith("moe_z_loss_weight=0.001: ") and f"{trainer} does not; set it to 0" in text
  assert problems(trainer) == []


@pytest.mark.parametrize(
  ("trainer", "instead"), [*((name, "nothing") for name in NATIVE), (DPO, "all weights"), (DISTILLATION, "all weights")]
)
def test_lora_is_refused_where_nobody_creates_adapters(trainer, instead):
  (text,) = problems(trainer, lora=True)
  assert text.startswith("lora.enable_lora=true: ") and f"{trainer} would train {instead}" in text
  assert problems(SFT, lora=True) == [] == problems(None, lora=True)


def test_quantised_kernels_are_not_stacked():
  (text,) = problems(SFT, lora=True, qtype="nf4")
  assert text.startswith("lora.lora_weight_qtype='nf4', scan_layers=true: ")
  assert problems(SFT, lora=True, qtype="nf4", scan=False) == [] == problems(SFT, lora=False, qtype="nf4")


def test_reinforcement_learning_is_refused():
  (text,) = problems(RL, z_loss=1e-3, lora=True)
  assert text.startswith(f"trainer={RL}: its rollouts are vLLM's")


@pytest.mark.parametrize("trainer", [*NATIVE, None])
def test_what_pre_training_computes_is_not_refused(trainer):
  assert problems(trainer, z_loss=1e-3) == []
  assert list(post_training.warnings(config(balancing=1e-3, mtp=1), trainer)) == []


def test_all_problems_are_in_one_error_and_the_rest_is_said(caplog):
  with pytest.raises(ValueError, match=r"moe_z_loss_weight=0.5: .*\nlora.enable_lora=true: "):
    post_training.check(config(z_loss=0.5, lora=True), DPO)
  post_training._warn_once.cache_clear()
  with caplog.at_level(logging.WARNING, "maxtext_ling2"):
    for _ in range(2):  # as it is made, and when the trainer loads the model
      post_training.check(config(balancing=1e-3, mtp=1), DPO)
    post_training.check(config(balancing=1e-3, mtp=1), SFT)
  texts = [record.message.partition(":")[0] for record in caplog.records]
  assert texts == ["routed_bias_update_rate=0.001", "mtp_num_layers=1", "routed_bias_update_rate=0.001"]


def call_in(name, file, inner="found = running()"):
  """What `running_trainer` answers when a function of such a module calls it."""
  module = types.ModuleType(name)
  module.__file__ = file
  module.running = running_trainer
  exec(f"def main():\n  {inner}\n  return found\n", module.__dict__)
  return module.main()


def test_the_running_trainer_is_found_as_a_module_and_as_a_file():
  file = "/env/site-packages/maxtext/trainers/post_train/sft/train_sft.py"
  assert call_in("maxtext.trainers.post_train.sft.train_sft", file) == SFT
  assert call_in("__main__", file) == SFT
  assert call_in("__main__", file.replace("train_sft", "train_sft_native")) == NATIVE[2]
  assert call_in("__main__", "/home/me/maxtext/train.py") is None
  assert running_trainer() is None and "maxtext" not in running_trainer.__code__.co_filename.split("/")[-1]


def test_a_module_that_is_being_imported_is_not_running(monkeypatch):
  monkeypatch.delitem(sys.modules, "maxtext.trainers.pre_train.train", raising=False)
  module = types.ModuleType("maxtext.trainers.pre_train.train")
  module.running = running_trainer
  exec("found = running()", module.__dict__)
  assert module.found is None
  assert "maxtext.trainers.pre_train.train" not in sys.modules
