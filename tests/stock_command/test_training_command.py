"""`maxtext-ling2 train`: the command it prints, what it shows, the summary. The trainer is a stand-in."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from maxtext_ling2.cli import app
from maxtext_ling2.stock_command import next_commands, process, shell, train
from maxtext_ling2.stock_command.settings import Settings, Words, split

pytestmark = pytest.mark.unit

TINY = "model_name=ling2-tiny"

TRAINER = """
import json, pathlib, signal, sys
given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
print("Config param steps: 3")
print("I1127 02:30:05.339522 1 maxtext_utils.py:2098] Num_devices: 2, shape (1, 2)")
if given.get("per_device_batch_size") == "0.3":
  raise ValueError("per_device_batch_size=0.3: no")
if given["steps"] == "0":
  sys.exit(0)
if given.get("learning_rate") == "9":
  print("maxtext-ling2: stopped by SIGINT after step 1; checkpoint x", flush=True)
  sys.exit(130)
with open(given["metrics_file"], "a") as file:
  for step in range(3):
    record = {"learning/lm_loss": 10.0 - step, "step": float(step), "run_name": "x"}
    record |= {"perf/step_time_seconds": 2.0, "perf/per_device_tokens_per_sec": 256.0}
    file.write(json.dumps(record) + "\\n")
items = pathlib.Path(given["base_output_directory"], given["run_name"], "checkpoints", "2", "items")
items.mkdir(parents=True)
(items / "weights").write_bytes(bytes(2_500_000))
"""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setattr(shell, "python_module", lambda module: [sys.executable, "-c", TRAINER])
  monkeypatch.setattr(next_commands.shutil, "which", lambda name: name)
  return tmp_path


def added(*words: str, platform: str = "cpu") -> dict[str, object]:
  return train.additions(Settings(split(words), shell.PRE_TRAINING), platform)


def test_a_cpu_gets_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
  monkeypatch.chdir(tmp_path)
  found = added(TINY, "run_name=first")
  assert found == {
    "base_output_directory": f"{tmp_path}/maxtext_output",
    "metrics_file": tmp_path / "maxtext_output" / "first" / "metrics.jsonl",
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "dtype": "float32",
    "sparse_matmul": False,
    "max_target_length": 256,
    "per_device_batch_size": 2,
  }
  assert str(added(TINY)["run_name"]).startswith("ling2-tiny-2")


def test_what_the_user_says_stays() -> None:
  mine = (
    "base_output_directory=/o", "run_name=r", "metrics_file=/m", "hardware=cpu", "skip_jax_distributed_system=false",
    "dtype=bfloat16", "sparse_matmul=true", "max_target_length=8", "per_device_batch_size=1",
  )  # fmt: skip
  assert added(TINY, *mine) == {}


def test_an_accelerator_gets_its_name_and_places_only() -> None:
  places = ("base_output_directory=/o", "run_name=r", "metrics_file=/m")
  assert added(TINY, *places, platform="tpu") == {}
  assert added(TINY, *places, platform="gpu") == {"hardware": "gpu"}


def test_changing_the_model_needs_no_further_word() -> None:
  """ling2.yml has dtype, which a CPU changes; ling2-tiny.yml has none."""
  assert added("model_name=ling2", "run_name=r")["override_model_config"] is True
  assert added(TINY, "vocab_size=64")["override_model_config"] is True
  assert "override_model_config" not in added(TINY, "steps=3")
  assert "override_model_config" not in added(TINY, "vocab_size=64", "override_model_config=false")


def test_a_bucket_keeps_metrics_and_log_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
  monkeypatch.chdir(tmp_path)
  found = added("model_name=ling2", "base_output_directory=gs://bucket/o", "run_name=r", platform="tpu")
  assert found == {"metrics_file": tmp_path / "maxtext_output" / "r" / "metrics.jsonl"}


def test_settings_of_a_yml_and_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
  yml = tmp_path / "my.yml"
  yml.write_text("base_config: base.yml\nmodel_name: ling2-tiny\nrun_name: mine\nsteps: 7\nvocab_size: 64\n")
  monkeypatch.setenv("M_LEARNING_RATE", "0.25")
  settings = Settings(Words(str(yml), ["steps=8"]), shell.PRE_TRAINING)
  assert [settings.value(field) for field in ("steps", "run_name", "learning_rate", "vocab_size", "base_emb_dim")] == [
    8, "mine", 0.25, 64, 128,
  ]  # fmt: skip
  assert settings.given("run_name") and settings.given("learning_rate") and not settings.given("base_emb_dim")
  assert settings.yml_changes_the_model


def test_sft_begins_with_maxtexts_yml_for_it() -> None:
  assert Settings(Words(None, [TINY]), shell.FINE_TUNING).value("use_sft") is True
  assert Settings(Words(None, [TINY]), shell.PRE_TRAINING).value("use_sft") is False


def test_train_shows_command_progress_and_summary(stand_in: Path) -> None:
  done = CliRunner().invoke(app, ["train", TINY, "dataset_type=synthetic", "steps=3", "run_name=first", "vocab_size=64"])
  folder = stand_in / "maxtext_output" / "first"
  assert done.exit_code == 0, done.output
  head, _, rest = done.stdout.partition(f"\n\nlog: {folder}/train.log\n")
  title, _, command = head.partition("\n\n")
  assert title == "maxtext-ling2 train: reading the settings, looking for devices ...\ntraining on cpu with"
  assert shlex.split(command.replace("\\\n", " "))[-14:] == [
    f"base_output_directory={stand_in}/maxtext_output", f"metrics_file={folder}/metrics.jsonl", "hardware=cpu",
    "skip_jax_distributed_system=true", "dtype=float32", "sparse_matmul=false", "max_target_length=256",
    "per_device_batch_size=2", "override_model_config=true", TINY, "dataset_type=synthetic", "steps=3", "run_name=first",
    "vocab_size=64",
  ]  # fmt: skip
  checkpoint = folder / "checkpoints" / "2"
  model = "vocab_size=64"
  assert rest.splitlines() == [
    "starting MaxText, compiling ...",
    "step 3/3, loss 8.000, about 0 s left",
    "loss 10.000 -> 8.000 nats per token (steps 0 and 2); 512 tokens/s",
    f"plot: {folder}/loss.png; metrics: {folder}/metrics.jsonl",
    f"checkpoint: {checkpoint} (2.5 MB)",
    "let it write:",
    f"  maxtext-ling2 generate {checkpoint} --model ling2-tiny {model} --prompt 'The for statement is used to'",
    "train on, for as many steps again:",
    f"  maxtext-ling2 train base_output_directory={stand_in}/maxtext_output {TINY} dataset_type=synthetic run_name=first "
    f"{model} steps=6",
    "export it for Hugging Face's libraries:",
    f"  maxtext-ling2 export {checkpoint} {folder}/hf-2 {TINY} {model}",
  ]
  assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
  assert "Config param" in (folder / "train.log").read_text()


def test_the_printed_command_can_be_pasted(stand_in: Path) -> None:
  arguments = [sys.executable, "-c", "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['A']]))"]
  words = ["base_output_directory=/with 'quotes' and $HOME", 'lora={"a": 1}', "--flag=x"]
  done = subprocess.run(
    ["bash", "-c", shell.as_shell([*arguments, *words], {"A": "b c"})], capture_output=True, check=True
  )
  assert json.loads(done.stdout) == [words, "b c"]


def test_a_run_that_was_stopped_says_how_it_goes_on(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  original = process.run

  def stopped(*arguments: Any, **keywords: Any) -> process.Ended:
    return process.Ended(original(*arguments, **keywords).code, (2,))

  monkeypatch.setattr(process, "run", stopped)
  words = [TINY, "run_name=first", "steps=3", "learning_rate=9"]
  (stand_in / "maxtext_output" / "first" / "checkpoints" / "1" / "items").mkdir(parents=True)
  done = CliRunner().invoke(app, ["train", *words])
  assert done.exit_code == 130
  assert done.stdout.splitlines()[-4:] == [
    "maxtext-ling2: stopped by SIGINT after step 1; checkpoint x",
    f"checkpoint: {stand_in}/maxtext_output/first/checkpoints/1 (0 bytes)",
    "go on:",
    f"  maxtext-ling2 train base_output_directory={stand_in}/maxtext_output {' '.join(words)}",
  ]


def test_a_run_that_has_all_its_steps(stand_in: Path) -> None:
  done = CliRunner().invoke(app, ["train", TINY, "run_name=first", "steps=0"])
  assert done.exit_code == 0
  said = "no step was left to train: this run has had its 0 steps; add more, or another run_name"
  assert said in done.stdout.splitlines()


def test_a_failure_is_one_sentence_and_the_trainers_exit_code(stand_in: Path) -> None:
  done = CliRunner().invoke(app, ["train", TINY, "run_name=first", "steps=3", "per_device_batch_size=0.3"])
  log = stand_in / "maxtext_output" / "first" / "train.log"
  assert done.exit_code == 1
  assert done.stderr == (
    f"error: training has failed with exit code 1: ValueError: per_device_batch_size=0.3: no\nall of it is in {log}\n"
  )


@pytest.mark.parametrize(
  ("words", "text"),
  [
    ([], "model_name: not given, and MaxText would train a model of its own; add one of ling2, ling2-tiny, "),
    ([TINY, "steps"], "'steps': not a setting of MaxText; write KEY=VALUE"),
    ([TINY, "no.yml"], "no.yml: no such file"),
    ([TINY, "a.yaml"], "a.yaml: MaxText takes a base yml only under a name that ends in .yml; rename it"),
    (
      [TINY, "base_output_directory=out"],
      "base_output_directory=out: MaxText writes no checkpoint below a relative path; ",
    ),
  ],
)
def test_bad_words_are_refused_before_anything_is_written(stand_in: Path, words: list[str], text: str) -> None:
  done = CliRunner().invoke(app, ["train", *words])
  assert done.exit_code == 1
  assert done.stderr.startswith(f"error: {text}")
  assert os.listdir(stand_in) == []


def test_several_processes_use_the_stock_command(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
  done = CliRunner().invoke(app, ["train", TINY])
  assert done.exit_code == 1
  assert "start MaxText's own command in each of them; --dry-run prints it" in done.stderr
