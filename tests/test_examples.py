"""The commands that examples/*.sh give for a model of one's own, by a Python that writes them down.

The commands themselves run in scripts/docs_test.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

RECORDER = """#!/bin/sh
case "$*" in
  "-m maxtext_ling2 recipe"* | -c*) exec {python} "$@" ;;
esac
printf '%s\\n' "$*" >> {record}
for word in "$@"; do case $word in */pretrain_*.yml) cp "$(dirname "$word")"/pretrain_*.yml {folder} ;; esac; done
"""
GIVEN = {"CHECKPOINT": "/checkpoint/0/items", "TOKENIZER": "/tokenizer", "DATA": "/data", "OUT": "/out", "HF_DIR": "/hf"}
COMMANDS = {
  "sft": "-m maxtext.trainers.post_train.sft.train_sft_native {yml} model_name=ling2-custom override_model_config=true ",
  "decode": "-m maxtext_ling2 generate /checkpoint/0/items --model {yml} --tokenizer /tokenizer ",
  "aot_plan": "-m maxtext_ling2 plan {yml} --search ",
  "from_hf_ling2_6_flash": "-m maxtext.checkpoint_conversion.to_maxtext {yml} model_name=ling2-custom ",
}


def run(folder, example, **variables):
  """(exit code, text of errors, commands) of an example."""
  record, python = folder / "record", folder / "python"
  python.write_text(RECORDER.format(python=sys.executable, record=record, folder=folder))
  python.chmod(0o755)
  environment = {key: value for key, value in os.environ.items() if key not in ("MODEL", "BASE_YML", "CPU")}
  environment |= GIVEN | {"PYTHON": str(python)} | variables
  done = subprocess.run(
    ["bash", str(ROOT / "examples" / f"{example}.sh")], env=environment, cwd=folder, capture_output=True, text=True
  )
  return done.returncode, done.stderr, record.read_text().splitlines() if record.exists() else []


@pytest.mark.parametrize("example", COMMANDS)
def test_a_model_by_its_yml(tmp_path, example):
  (tmp_path / "my.yml").write_text("")
  code, text, commands = run(tmp_path, example, BASE_YML="my.yml")
  assert code == 0, text
  assert commands and commands[0].startswith(COMMANDS[example].format(yml=tmp_path / "my.yml"))


def test_a_recipe_on_a_model_by_its_yml(tmp_path):
  """The recipe inherits from the model's file; both of the recipe's files are as they were but for that."""
  (tmp_path / "my.yml").write_text("")
  code, text, commands = run(tmp_path, "pretrain_ling2", BASE_YML="my.yml")
  assert code == 0, text
  assert commands[0].startswith("-m maxtext.trainers.pre_train.train /")
  assert commands[0].split()[2].endswith("/pretrain_ling2_recommended.yml") and "model_name=" not in commands[0]
  changed = {
    'base_config: "base.yml"': f'base_config: "{tmp_path}/my.yml"',
    'model_name: "ling2"': 'model_name: "ling2-custom"',
  }
  for name in ("pretrain_ling2.yml", "pretrain_ling2_recommended.yml"):
    ours = (ROOT / "maxtext_ling2" / "configs" / "recipes" / name).read_text().splitlines()
    assert (tmp_path / name).read_text().splitlines() == [changed.get(line, line) for line in ours]


@pytest.mark.parametrize("example", [*COMMANDS, "pretrain_ling2"])
@pytest.mark.parametrize("cpu", ["", "1"])
def test_its_name_alone_is_refused_at_once(tmp_path, example, cpu):
  code, text, commands = run(tmp_path, example, MODEL="ling2-custom", CPU=cpu)
  assert (code, commands) == (1, [])
  assert text == (
    "Error: MODEL=ling2-custom: this name has no sizes of its own; pass the YAML file that has them, such as "
    "`maxtext-ling2 config HF_DIR -o my.yml` writes: BASE_YML=my.yml\n"
  )


def test_every_example_is_here():
  assert {path.stem for path in (ROOT / "examples").glob("*.sh")} == {*COMMANDS, "pretrain_ling2", "common"}
  assert shutil.which("bash")
