"""`maxtext-ling2 config`: the yml it prints is one that MaxText loads as the folder's model."""

import json

import folders
import pytest
from typer.testing import CliRunner

from maxtext_ling2.checkpoint import hf_config
from maxtext_ling2.cli import app
from maxtext_ling2.maxtext_api import session  # noqa: F401  the plugin

YARN = {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "mscale_all_dim": 0.7}}
RUNNER = CliRunner()


def load(yml, *words):
  from maxtext.configs import pyconfig

  settings = [
    "run_name=x",
    "base_output_directory=/tmp",
    "enable_checkpointing=false",
    "skip_jax_distributed_system=true",
  ]
  return pyconfig.initialize(["", str(yml), "model_name=ling2-custom", "log_config=false", *settings, *words])


@pytest.mark.parametrize("case", [*folders.CASES, "generated", "yarn"])
def test_maxtext_loads_what_it_prints(tmp_path, case):
  if case in folders.CASES:
    folder = folders.GOLDEN / case
  else:
    folder = folders.write(tmp_path / "hf", num_nextn_predict_layers=1, **(YARN if case == "yarn" else {}))
  printed = RUNNER.invoke(app, ["config", str(folder)])
  assert printed.exit_code == 0
  written = RUNNER.invoke(app, ["config", str(folder), "-o", str(tmp_path / "model.yml")])
  assert (written.exit_code, written.stdout) == (0, "")
  assert written.stderr.startswith(f"wrote {tmp_path / 'model.yml'}, the settings of {folder}; MaxText takes it")
  assert (tmp_path / "model.yml").read_text() == printed.stdout
  config = load(tmp_path / "model.yml")
  for field, value in hf_config.to_maxtext(hf_config.read(folder)).items():
    found = getattr(config, field)
    assert getattr(found, "value", found) == value, field
  assert config.sft_train_on_completion_only  # MaxText's base.yml says false
  assert config.routed_bias_zero_mean_update and not config.calculate_per_token_loss
  assert (config.rope_type == "yarn") == (case == "yarn")


def test_what_stands_in_it_can_be_changed_on_the_command_line(tmp_path):
  yml = tmp_path / "model.yml"
  assert RUNNER.invoke(app, ["config", str(folders.GOLDEN / "one_cycle"), "-o", str(yml)]).exit_code == 0
  config = load(yml, "base_num_decoder_layers=10", "max_target_length=77", "scan_layers=false")
  assert (config.num_decoder_layers, config.max_target_length, config.scan_layers) == (10, 77, False)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"architectures": ["BailingMoeV2ForCausalLM"]}, ["BailingMoeV2ForCausalLM", "Ling 2.0", "would need"]),
    ({"architectures": ["BailingMoeLinearForCausalLM"]}, ["Ring-linear", "GQA instead of MLA"]),
    ({"architectures": ["BailingHybridForCausalLM"]}, ["Ling 3.0", "KDA"]),
    ({"architectures": []}, ["bailing_hybrid", "write it into config.json"]),
    ({"use_bias": True, "hidden_act": "gelu"}, ["use_bias=True", "hidden_act='gelu'"]),
  ],
)
def test_other_models_are_refused_by_name(tmp_path, changes, words):
  (tmp_path / "config.json").write_text(json.dumps(folders.TINY | changes))
  found = RUNNER.invoke(app, ["config", str(tmp_path)])
  assert found.exit_code == 1 and found.stdout == ""
  for word in words:
    assert word in " ".join(found.stderr.split())


def test_no_folder(tmp_path):
  found = RUNNER.invoke(app, ["config", str(tmp_path / "gone")])
  assert found.exit_code == 1 and "no such file" in found.stderr


def test_a_file_is_replaced_only_with_force(tmp_path):
  yml, folder = tmp_path / "my.yml", str(folders.GOLDEN / "one_cycle")
  yml.write_text("mine")
  refused = RUNNER.invoke(app, ["config", folder, "-o", str(yml)])
  assert (refused.exit_code, yml.read_text()) == (1, "mine")
  assert refused.stderr == f"error: -o {yml}: exists already; pass --force to replace it, or name another file\n"
  assert RUNNER.invoke(app, ["config", folder, "-o", str(yml), "--force"]).exit_code == 0
  assert "model_name" in yml.read_text()
