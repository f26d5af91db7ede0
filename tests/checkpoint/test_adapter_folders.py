"""Adapters in peft's form: what is exported opens elsewhere, what others wrote loads, merging adds alpha / r * B A."""

import json
import types

import folders
import numpy as np
import pytest
from etils import epath
from rich.console import Console
from safetensors.numpy import load_file, save_file

from maxtext_ling2.checkpoint import conversion, lora, mapping
from maxtext_ling2.checkpoint.orbax_store import Storage
from maxtext_ling2.errors import CheckpointError
from maxtext_ling2.maxtext_api import session

RANK, ALPHA = 3, 5.0
SETTINGS = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": ["dense"]}
PARTS = ("query_key_value", "g_proj", "dense", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")


def weights_to_adapt(config, experts=False):
  """{Hugging Face name: [out, in]} of all projections, with or without those of experts."""
  entries = [entry for entry in mapping.entries(config) if entry.linear and entry.path[-2] != "gate"]
  entries = [entry for entry in entries if entry.path[0] == "decoder" and "logits_dense" not in entry.path]
  return {name: entry.hf_shape for entry in entries if experts or len(entry.names) == 1 for name in entry.names}


def factors(shapes):
  """Random factors by peft's names."""
  rng = np.random.default_rng(0)
  found = {}
  for name, (outputs, inputs) in shapes.items():
    module = "base_model.model." + name.removesuffix(".weight")
    found[f"{module}.lora_A.weight"] = rng.standard_normal((RANK, inputs)).astype(np.float32)
    found[f"{module}.lora_B.weight"] = rng.standard_normal((outputs, RANK)).astype(np.float32)
  return found


def write(folder, tensors, **changes):
  """An adapter's folder, written by the safetensors library."""
  folder.mkdir(parents=True)
  save_file(tensors, folder / "adapter_model.safetensors")
  (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | changes))
  return folder


def asking(config, **options):
  """The config of a command with these settings of LoRA."""
  values = {"lora_restore_path": "", "lora_rank": 0, "lora_alpha": ALPHA, "enable_lora": False} | options
  return session.changed(config, lora=types.SimpleNamespace(**values))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  return folders.write(tmp_path_factory.mktemp("base") / "hf", dtype="F32")


@pytest.fixture(scope="module", params=[False, True], ids=["unscanned", "scanned"])
def config(request, base):
  return folders.config(base, scan_layers=request.param)


@pytest.fixture(scope="module")
def restored(config, tmp_path_factory):
  """An adapter of peft as a checkpoint of MaxText."""
  folder = tmp_path_factory.mktemp("adapter")
  tensors = factors(weights_to_adapt(config))
  write(folder / "peft", tensors)
  arguments = ("", config, str(folder / "0"), "bfloat16", str(folder / "peft"))
  assert isinstance(conversion.check(*arguments), lora.Adapters)
  conversion.run(*arguments, True, True)
  return folder / "0", tensors


def test_an_adapter_comes_back_with_peft_names(config, base, restored, tmp_path):
  checkpoint, tensors = restored
  asked = asking(config, lora_restore_path=str(checkpoint))
  lora.exporter("", asked).write(str(tmp_path / "out"), "the base")
  found = load_file(tmp_path / "out" / "adapter_model.safetensors")
  assert found.keys() == tensors.keys()
  for name, tensor in found.items():
    np.testing.assert_array_equal(tensor, tensors[name])
  settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
  assert (settings["peft_type"], settings["r"], settings["lora_alpha"], settings["bias"]) == ("LORA", RANK, ALPHA, "none")
  modules = {name.removesuffix(".weight") for name in folders.read(base)}
  assert set(settings["target_modules"]) <= modules
  assert {name.rpartition(".")[2] for name in settings["target_modules"]} == {*PARTS, "gate_proj", "up_proj", "down_proj"}


def test_merged_weights_are_the_sum_in_both_directions(config, base, restored, tmp_path):
  checkpoint, tensors = restored
  adapter = write(tmp_path / "peft", tensors)
  weights = folders.read(base)
  expected = dict(weights)
  for name in weights_to_adapt(config):
    module = "base_model.model." + name.removesuffix(".weight")
    product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
    expected[name] = weights[name] + ALPHA / RANK * product
  conversion.run(str(base), config, str(tmp_path / "plain" / "0"), "float32", "", True, True)
  conversion.run(str(base), config, str(tmp_path / "merged" / "0"), "float32", str(adapter), True, True)
  exports = {
    "plain": asking(config, lora_restore_path=str(checkpoint)),  # merged as it is exported
    "merged": asking(config),  # merged as it was converted
  }
  for name, asked in exports.items():
    lora.exporter(str(tmp_path / name / "0"), asked).run(tmp_path / f"{name} hf", "float32", None, Console(quiet=True))
    found = folders.read(tmp_path / f"{name} hf")
    assert found.keys() == expected.keys()
    for tensor, value in found.items():
      np.testing.assert_allclose(value, expected[tensor], atol=1e-6, rtol=1e-6, err_msg=tensor)


def test_adapters_of_experts_merge_but_are_not_maxtexts(base, config, tmp_path):
  shapes = weights_to_adapt(config, experts=True)
  adapter = write(tmp_path / "peft", factors(shapes))
  assert len(lora.from_peft(adapter, config).by_name) == len(shapes) > 5 * 3 * 5
  assert conversion.check(str(base), config, str(tmp_path / "0"), "float32", str(adapter))
  with pytest.raises(CheckpointError, match="MaxText's LoRA has one factor for all experts"):
    conversion.check("", config, str(tmp_path / "0"), "float32", str(adapter))


def broken(name, tensors):
  """Tensors and settings of a damaged adapter."""
  first, second = list(tensors)[:2]
  if name == "half":
    return {first: tensors[first]}, {}
  if name == "rank":
    return tensors, {"r": RANK + 1}
  if name == "unknown":
    return {first.replace("layers", "blocks"): tensors[first]}, {}
  if name == "embedding":
    return {f"base_model.model.model.word_embeddings.lora_{letter}.weight": tensors[first] for letter in "AB"}, {}
  if name == "empty":
    return {}, {}
  return tensors, dict([name])


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("half", "do not fit"),
    ("rank", "do not fit"),
    ("unknown", "is no LoRA factor of a weight of this model"),
    ("embedding", "word_embeddings.lora_A.weight is no LoRA factor"),
    ("empty", "no adapter in it"),
    (("use_dora", True), "use_dora=True, but MaxText's LoRA has use_dora=False only"),
    (("use_rslora", True), "use_rslora=True"),
    (("rank_pattern", {"dense": 4}), "rank_pattern={'dense': 4}"),
    (("modules_to_save", ["lm_head"]), "modules_to_save="),
    (("r", "3"), "r is not a positive integer"),
    (("lora_alpha", None), "lora_alpha is not a number"),
  ],
  ids=str,
)
def test_another_adapter_is_refused(base, tmp_path, name, message):
  config = folders.config(base, scan_layers=False)
  tensors, changes = broken(name, factors(weights_to_adapt(config)))
  with pytest.raises(CheckpointError) as error:
    lora.from_peft(write(tmp_path / "peft", tensors, **changes), config)
  assert message in str(error.value)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"lora_alpha": 0.0}, "lora.lora_alpha=0.0: the scale of the adapters is lora_alpha / rank"),
    ({"lora_rank": 4}, "its adapters have rank [3], not lora.lora_rank=4"),
  ],
  ids=["alpha", "rank"],
)
def test_a_scale_that_nobody_said_is_refused(config, restored, options, message):
  with pytest.raises(CheckpointError) as error:
    lora.exporter("", asking(config, lora_restore_path=str(restored[0]), **options))
  assert message in str(error.value)


def test_another_layout_and_an_existing_folder_are_refused(base, config, restored, tmp_path):
  other = folders.config(base, scan_layers=not config.scan_layers)
  with pytest.raises(CheckpointError, match=r"adapters of no weight of this model|there is no adapter"):
    lora.from_checkpoint(epath.Path(restored[0]), asking(other))
  adapters = lora.from_checkpoint(epath.Path(restored[0]), asking(config))
  with pytest.raises(CheckpointError, match="already exists"):
    lora.check(adapters, config, epath.Path(restored[0]))
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "file").write_text("")
  with pytest.raises(CheckpointError, match="not an empty folder"):
    lora.exporter("", asking(config, lora_restore_path=str(restored[0]))).write(str(tmp_path / "full"), None)


def test_half_of_a_scanned_weight_is_refused(base, tmp_path):
  config = folders.config(base, scan_layers=True)
  names = [name for name in weights_to_adapt(config) if "layers.2." in name]
  shapes = weights_to_adapt(config)
  adapters = lora.from_peft(write(tmp_path / "peft", factors({name: shapes[name] for name in names})), config)
  with pytest.raises(CheckpointError, match="have an adapter, but MaxText needs all or none"):
    lora.write(adapters, config, epath.Path(tmp_path / "0"), Storage())
  assert not (tmp_path / "0").exists()
  unscanned = folders.config(base, scan_layers=False)
  lora.write(adapters, unscanned, epath.Path(tmp_path / "0"), Storage())
  assert lora.from_checkpoint(epath.Path(tmp_path / "0"), asking(unscanned)).by_name.keys() == set(names)
