"""Commands that build a decode cache: `config` leaves room after the prompt; without room, an error says what to pass."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny
from maxtext_ling2.cli import app
from maxtext_ling2.inference import saved_model
from maxtext_ling2.maxtext_api import session
from test_generate import GOLDEN

TIGHT = {"max_target_length": 24, "max_prefill_predict_length": 24}
WORDS = ("attention=dot_product", "scan_layers=false", "skip_jax_distributed_system=true", "log_config=false")


def engine(config):
  from maxtext.inference.maxengine import maxengine

  return maxengine.MaxEngine(config)


@pytest.mark.parametrize("prompt", [24, 100])
def test_no_room(prompt):
  with pytest.raises(ValueError) as error:
    engine(tiny.config(**TIGHT | {"max_prefill_predict_length": prompt}))
  assert str(error.value) == (
    f"max_prefill_predict_length={prompt}: this command builds a decode cache, whose prompt must be shorter than "
    "max_target_length=24; pass max_prefill_predict_length=12 override_model_config=true"
  )
  assert tiny.model(tiny.config(**TIGHT))  # training builds no cache


def test_what_the_error_says_helps():
  assert engine(tiny.config(**TIGHT | {"max_prefill_predict_length": 12})).config.max_prefill_predict_length == 12


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  """(yml of `config`, checkpoint) of a golden folder."""
  folder = tmp_path_factory.mktemp("converted")
  yml = folder / "model.yml"
  assert CliRunner().invoke(app, ["config", str(GOLDEN / "one_cycle"), "-o", str(yml)]).exit_code == 0
  return yml, session.convert(str(yml), "ling2-custom", str(GOLDEN / "one_cycle"), str(folder / "out"), "float32", False)


def test_written_yml(converted):
  text = converted[0].read_text()
  assert "max_target_length: 256\nmax_prefill_predict_length: 128\n" in text


def test_own_model_by_its_yml(converted):
  """`generate` and `eval` open a MaxText checkpoint with `--model my.yml`: the config and the weights of the folder."""
  yml, checkpoint = converted
  sizes = {"max_prefill_predict_length": 16, "max_target_length": 24}
  source = saved_model.locate(Path(checkpoint), str(yml))
  config, stated = saved_model.make_config(source, sizes)
  assert (config.model_name, config.scan_layers, stated) == ("ling2-custom", False, None)
  assert (config.emb_dim, config.vocab_size, config.max_target_length) == (64, 384, 24)
  found = saved_model.read_weights(source, config)
  folder = saved_model.locate(GOLDEN / "one_cycle", None)
  expected = saved_model.read_weights(folder, saved_model.make_config(folder, sizes)[0])
  assert found.keys() == expected.keys() and len(found) > 30
  for path, value in expected.items():
    np.testing.assert_array_equal(found[path], value, err_msg=str(path))


@pytest.mark.parametrize(
  ("model", "message"),
  [
    ("ling2-custom", "--model ling2-custom: this name has no sizes of its own; .*: --model my.yml"),
    ("nowhere.yml", "nowhere.yml: no such file; pass a model_name such as ling2, or the yml"),
    ("my.yaml", "my.yaml: MaxText takes a base yml only under a name that ends in .yml; rename it"),
  ],
)
def test_what_is_no_own_model(converted, model, message):
  with pytest.raises(ValueError, match=message):
    saved_model.locate(Path(converted[1]), model)


@pytest.mark.parametrize("prompt", [(), ("max_prefill_predict_length=256",)])
def test_the_real_command(converted, tmp_path, prompt):
  """MaxText's reshard_checkpoint runs with the yml as it is, or says in its last line what to pass."""
  yml, checkpoint = converted
  command = ["-m", "maxtext.checkpoint_conversion.reshard_checkpoint", str(yml), "model_name=ling2-custom"]
  command += [f"load_parameters_path={checkpoint}", f"base_output_directory={tmp_path}", *WORDS, "ici_fsdp_parallelism=2"]
  environment = os.environ | {"DECOUPLE_GCLOUD": "TRUE"}
  done = subprocess.run(
    [sys.executable, *command, *prompt, "--simulated_cpu_devices_count=2"],
    env=environment,
    capture_output=True,
    text=True,
  )
  if prompt:
    assert done.returncode == 1
    assert "max_target_length=256; pass max_prefill_predict_length=128 override_model_config=true" in done.stderr
  else:
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "0" / "items").is_dir()
