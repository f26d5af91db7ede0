"""MaxText's own commands as subprocesses on the oracle folders: to_maxtext, to_huggingface, train."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import folders
import numpy as np
import pytest

from maxtext_ling2.checkpoint import exported_code, model_yml
from maxtext_ling2.demo import data
from maxtext_ling2.errors import CheckpointError
from maxtext_ling2.maxtext_api import session  # noqa: F401  the plugin

ROOT = Path(__file__).parent.parent.parent
CASES = ("one_cycle", "trailing_mtp")
TOKENIZER = {"tokenizer.json": "{}", "merges.txt": "a b\n", "LICENSE": "theirs\n", "NOTICE.txt": "see LICENSE\n"}


def run(module, *words, expect=0):
  """Runs `python -m MODULE` with the plugin of this checkout; returns what it printed."""
  environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "maxtext_ling2", "run", module, *map(str, words)]
  done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=280)
  assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-3000:]
  return done.stdout + done.stderr


@dataclasses.dataclass
class Converted:
  case: str
  yml: Path
  checkpoint: Path
  scan: bool
  printed: str

  def words(self, output):
    settings = ("model_name=ling2-custom", "skip_jax_distributed_system=true", "hardware=cpu", "log_config=false")
    return (self.yml, *settings, "run_name=x", f"base_output_directory={output}", f"scan_layers={str(self.scan).lower()}")


@pytest.fixture(
  scope="module", params=[pytest.param(("one_cycle", False), marks=pytest.mark.slow), ("trailing_mtp", True)], ids=CASES
)
def converted(request, tmp_path_factory):
  case, scan = request.param
  folder = tmp_path_factory.mktemp(case)
  (folder / "model.yml").write_text(model_yml.text(folders.GOLDEN / case))
  found = Converted(case, folder / "model.yml", folder / "mt" / "0" / "items", scan, "")
  found.printed = run(
    "maxtext.checkpoint_conversion.to_maxtext",
    *found.words(folder / "mt"),
    f"--hf_model_path={folders.GOLDEN / case}",
    "--save_dtype=float32",
  )
  return found


def test_to_maxtext_and_back(converted, tmp_path):
  assert converted.checkpoint.is_dir()
  count = len(folders.read(folders.GOLDEN / converted.case))
  assert "config.json has no gla_decay_layer_offset; using 0." in converted.printed
  assert f"{count}/{count} tensors" in converted.printed and "MiB" in converted.printed
  tokenizer = tmp_path / "tokenizer"
  tokenizer.mkdir()
  for name, text in TOKENIZER.items():
    (tokenizer / name).write_text(text)
  (tokenizer / "modeling.py").write_text("raise SystemExit('remote code')")
  (tokenizer / "config.json").write_text('{"eos_token_id": 5, "auto_map": {"AutoConfig": "modeling.X"}}')
  (tokenizer / "tokenizer_config.json").write_text('{"a": 1, "auto_map": {"AutoTokenizer": ["modeling.X", null]}}')
  run(
    "maxtext.checkpoint_conversion.to_huggingface",
    *converted.words(tmp_path / "hf"),
    f"load_parameters_path={converted.checkpoint}",
    f"--hf_model_path={tokenizer}",
  )
  folders.assert_equal(folders.read(tmp_path / "hf"), folders.read(folders.GOLDEN / converted.case))
  for name, text in TOKENIZER.items():
    assert (tmp_path / "hf" / name).read_text() == text
  assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text()) == {"a": 1}
  assert sorted(path.name for path in (tmp_path / "hf").glob("*.py")) == sorted(exported_code.FILES)
  for name in exported_code.FILES:
    text = (tmp_path / "hf" / name).read_text()
    assert text == (exported_code.FOLDER / name).read_text() and "SPDX-License-Identifier: Apache-2.0" in text
  written = json.loads((tmp_path / "hf" / "config.json").read_text())
  original = json.loads((folders.GOLDEN / converted.case / "config.json").read_text())
  same = [key for key in original if not key.endswith(("dropout", "_token_id", "use_cache", "initializer_range"))]
  assert {key: written[key] for key in same} == {key: original[key] for key in same}
  assert written["eos_token_id"] == 5 and written["gla_decay_layer_offset"] == 0
  entry_points = {part.partition(".")[0] + ".py" for part in written["auto_map"].values()}
  assert entry_points == {"configuration_ling2.py", "modeling_ling2.py"}  # attention_ling2.py is imported by the model
  assert not (tmp_path / "hf" / written["transformers_weights"]).exists()
  assert written["pad_token_id"] is None  # the official default, 156892, is beyond this vocabulary


@pytest.mark.slow
def test_training_starts_at_the_oracles_loss(converted, tmp_path):
  """Three steps from the converted checkpoint; the first loss is that of the recorded logits of the official code."""
  with np.load(folders.GOLDEN / converted.case / "io_short.npz") as recorded:
    ids, logits = recorded["input_ids"], recorded["eval.logits"].astype(np.float64)
  unused = sorted(set(range(384)) - set(ids.flat))[0]  # an end-of-document token that occurs nowhere
  data.write([row.astype(np.uint16) for row in ids] * 4, tmp_path / "rows")
  metrics = tmp_path / "metrics.jsonl"
  run(
    "maxtext.trainers.pre_train.train",
    *converted.words(tmp_path / "run"),
    *("dataset_type=grain", "grain_file_type=mmap", f"grain_train_files={tmp_path / 'rows'}", "grain_worker_count=0"),
    *(f"mmap_eod_id={unused}", "enable_data_shuffling=false", "packing=true", "packing_max_segments_per_sample=0"),
    *(f"load_parameters_path={converted.checkpoint}", "async_checkpointing=false", "enable_goodput_recording=false"),
    *("steps=3", "per_device_batch_size=2", "max_target_length=24", "gla_decay_layer_offset=1", "learning_rate=1e-3"),
    *("dtype=float32", "matmul_precision=highest", "attention=dot_product", "sparse_matmul=false", "jax_cache_dir="),
    *(f"metrics_file={metrics}", "enable_tensorboard=false", "save_checkpoint_on_completion=false"),
  )
  losses = [json.loads(line)["learning/lm_loss"] for line in metrics.read_text().splitlines()]
  assert len(losses) == 3
  shifted = logits[:, :-1] - logits[:, :-1].max(-1, keepdims=True)
  picked = np.take_along_axis(shifted, ids[:, 1:, None], -1)[..., 0]
  expected = float(np.mean(np.log(np.exp(shifted).sum(-1)) - picked))
  assert losses[0] == pytest.approx(expected, abs=1e-4)
  assert losses[2] < losses[0]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"hf_model_path": "/nowhere"}, "--hf_model_path=/nowhere: not a local folder"),
    ({"hf_model_path": None}, "--hf_model_path=None: not a local folder"),
    ({"lazy_load_tensors": False}, "--lazy_load_tensors=false: not possible for LING2"),
    ({"save_dtype": "float8_e4m3fn"}, "save_dtype=float8_e4m3fn: not one of float32, bfloat16"),
    ({"lora": "adapter"}, "hf_lora_adapter_path=adapter: not a local folder"),
  ],
)
def test_the_command_refuses_in_words(tmp_path, options, message):
  from maxtext.checkpoint_conversion import to_maxtext

  (tmp_path / "model.yml").write_text(model_yml.text(folders.GOLDEN / "one_cycle"))
  words = Converted("one_cycle", tmp_path / "model.yml", tmp_path, False, "").words(tmp_path / "mt")
  words = [*map(str, words), *(f"hf_lora_adapter_path={value}" for key, value in options.items() if key == "lora")]
  settings = {"hf_model_path": str(folders.GOLDEN / "one_cycle"), "save_dtype": "float32"} | options
  settings.pop("lora", None)
  with pytest.raises(CheckpointError) as error:
    to_maxtext.main(["", *words], simulated_cpu_devices_count=1, **settings)
  assert message in str(error.value)
  assert not (tmp_path / "mt").exists()
