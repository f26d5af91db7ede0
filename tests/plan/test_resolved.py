"""Which model is planned, from MaxText's own config; nothing is compiled."""

import io

import pytest
from rich.console import Console

from maxtext_ling2.maxtext_api.start import ConfigError
from maxtext_ling2.plan import command
from maxtext_ling2.plan.chips import CHIPS
from maxtext_ling2.plan.resolved import ModelError, planned_config


@pytest.fixture(autouse=True)
def compiles_nothing(monkeypatch, tmp_path):
  def compile_step(*_):
    raise AssertionError("compiled")

  monkeypatch.setattr(command, "estimate", compile_step)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def plan(model, *words, **more):
  command.run(Console(file=io.StringIO()), command.Request(model, ["v6e-8"], words=words, **more), None, None)


def test_the_planned_model_is_the_named_one(tmp_path):
  yml = tmp_path / "mine.yml"
  yml.write_text("base_config: base.yml\nmodel_name: ling2\n")
  for model in ("ling2", str(yml)):
    for name in ("llama2-7b", "ling2.6-flash"):
      with pytest.raises(
        ModelError, match=rf"model_name={name}: this command plans ling2, .* leave model_name out, or name"
      ):
        plan(model, f"model_name={name}")
  with pytest.raises(ModelError, match="model_name=ling2.6-flash: this command plans ling2, "):
    plan("ling2", "model_name=ling2.6-flash", recipe="ling2-v5p-64")
  with pytest.raises(ModelError, match="model_name=ling2.6-flash: this command plans ling2, "):
    plan("ling2", "model_name=ling2.6-flash", search=True)


def test_one_of_several_meshes_does_not_hide_another_model():
  with pytest.raises(ModelError, match="model_name=llama2-7b: this command plans ling2"):
    plan("ling2", "model_name=llama2-7b", meshes=("", "tensor=4"))


def test_another_decoder_block_is_refused(tmp_path):
  """Beside the name of a LING2 model by the seam, in a YAML file without a model by plan itself."""
  with pytest.raises(ConfigError, match="model_name=ling2: this run has decoder_block=llama2, .* no decoder_block"):
    plan("ling2", "decoder_block=llama2")
  yml = tmp_path / "mine.yml"
  yml.write_text("base_config: base.yml\n")
  with pytest.raises(ModelError, match=r"decoder_block=llama2: not a LING2 model, .*train_compile"):
    plan(str(yml), "model_name=default", "decoder_block=llama2")


@pytest.mark.parametrize("search", [False, True])
def test_no_ling2_at_all_is_refused(search):
  with pytest.raises(ModelError, match=r"model_name=llama2-7b, decoder_block=llama2: not a LING2 model, .*train_compile"):
    plan("llama2-7b", search=search)


def test_a_variable_that_makes_another_model_is_refused(monkeypatch):
  monkeypatch.setenv("M_MODEL_NAME", "llama2-7b")
  with pytest.raises(ConfigError, match="M_MODEL_NAME=llama2-7b"):
    plan("ling2")


def test_a_yaml_file_without_a_model_takes_the_one_of_the_words(tmp_path):
  yml = tmp_path / "mine.yml"
  yml.write_text("base_config: base.yml\n")
  with pytest.raises(AssertionError, match="compiled"):
    plan(str(yml), "model_name=ling2")


def test_the_models_tflop_are_the_same_for_every_chip():
  """What `plan` prints and the training log names: 46.434 TFLOP per row of 4096 tokens."""
  from maxtext.utils import maxtext_utils

  base, settings = command._model("ling2")
  found = set()
  for chip in CHIPS:
    config = planned_config(base, f"{chip}-16", settings | {"max_target_length": "4096"}, "ling2")
    found.add(maxtext_utils.calculate_tflops_training_per_device(config, log=False))
  assert [total for total, *_ in found] == [pytest.approx(46.434, abs=5e-4)]
