"""LoRA adapters on their way through MaxText's conversion commands, whose functions are called as the commands do."""

import types

import pytest

from maxtext_ling2.errors import CheckpointError
from maxtext_ling2.host.seams.to_huggingface import ToHuggingFaceSeam
from maxtext_ling2.host.seams.to_maxtext import Request, ToMaxTextSeam


class Exporter:
  """Remembers where it was told to write."""

  def __init__(self):
    self.written = []

  def keys(self):
    return ["params-a"]

  def write(self, folder, tokenizer):
    self.written.append((folder, tokenizer))


def config(block="ling2", **settings):
  lora = types.SimpleNamespace(lora_restore_path="adapter")
  defaults = {"decoder_block": block, "lora": lora, "load_parameters_path": "", "hf_lora_adapter_path": ""}
  defaults |= {"model_name": "ling2-tiny", "base_output_directory": "/out", "run_name": "run"}
  return types.SimpleNamespace(**defaults | settings)


def save_adapter_files(output_dir, weights, config, found_modules, model_id):
  """With the parameters of MaxText's."""
  return "MaxText", output_dir, weights


def test_an_adapter_without_a_checkpoint_is_exported_by_us_once():
  exporter, opened = Exporter(), []
  seam = ToHuggingFaceSeam(lambda path, config: opened.append(path) or exporter)
  assert seam._load(None, config()).keys() == {"params-a"} and opened == [""]
  arguments = ("/folder", {}, config(), set(), "the base")  # MaxText finds no arrays among the placeholders
  assert seam._save_adapter(save_adapter_files, *arguments) is None
  assert exporter.written == [("/folder", "the base")]
  assert seam._save_adapter(save_adapter_files, *arguments) == ("MaxText", "/folder", {})


def test_an_adapter_with_a_checkpoint_and_another_models_are_not_taken_for_one():
  seam = ToHuggingFaceSeam(lambda path, config: Exporter())
  seam._load(None, config(load_parameters_path="checkpoint"))
  assert seam._save_adapter(save_adapter_files, "/folder", {}, None, set(), "")[0] == "MaxText"
  assert seam._load(lambda config: "loaded", config("llama2")) == "loaded"
  assert seam._save_adapter(save_adapter_files, "/folder", {"a": 1}, None, set(), "") == ("MaxText", "/folder", {"a": 1})


def test_a_bucket_is_refused_for_an_adapter():
  seam = ToHuggingFaceSeam(lambda path, config: Exporter())
  seam._load(None, config())
  with pytest.raises(CheckpointError, match="base_output_directory=gs://b: not a local folder"):
    seam._save_adapter(save_adapter_files, "gs://b", {}, None, set(), "")


def request(folder, adapter, **settings):
  """(what is checked, the request) of a command with these folders."""
  checked = []
  seam = ToMaxTextSeam(lambda *arguments: checked.append(arguments), None)
  arguments = {"hf_model_path": folder, "lazy_load_tensors": True, "save_dtype": "float32"}
  asked = config(hf_lora_adapter_path=adapter, **settings)
  made = seam._requested(arguments, asked)
  return [(path, target, dtype, given) for path, _, target, dtype, given in checked], made


def test_an_adapter_is_converted_alone_into_maxtexts_folder(tmp_path):
  adapter = str(tmp_path)
  checked, made = request(None, adapter)
  target = f"/out/ling2-tiny/{tmp_path.name}/0"
  assert checked == [("", target, "float32", adapter)] and made == Request("", "float32", adapter)


def test_an_adapter_is_merged_into_the_folder(tmp_path):
  base, adapter = tmp_path / "base", tmp_path / "adapter"
  base.mkdir(), adapter.mkdir()
  checked, made = request(str(base), str(adapter), load_parameters_path="merge")
  assert checked == [(str(base), "/out/0", "float32", str(adapter))]
  assert made == Request(str(base), "float32", str(adapter))
  with pytest.raises(CheckpointError, match="--hf_model_path=None: not a local folder"):
    request(None, str(adapter), load_parameters_path="merge")
  with pytest.raises(CheckpointError, match="hf_lora_adapter_path=org/adapter: not a local folder"):
    request(str(base), "org/adapter")


def test_maxtext_reads_no_adapter_of_ling2():
  """It would need PyTorch."""
  seam = ToMaxTextSeam(None, None)
  assert seam._adapter(lambda path: {"a": path}, "folder") == {"a": "folder"}
  seam.request = Request("", "float32", "folder")
  assert seam._adapter(lambda path: {"a": path}, "folder") == {}
