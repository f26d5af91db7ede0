"""Hugging Face -> MaxText -> Hugging Face and MaxText -> Hugging Face -> MaxText: every tensor comes back bit by bit.

The checkpoint between them is also read by the function with which MaxText's trainer restores, and compared with tensors
that are put together in another way: whole, by np.stack, instead of in blocks.
"""

import logging

import folders
import numpy as np
import pytest
from etils import epath
from rich.console import Console

from maxtext_ling2.checkpoint import blocks, hf_config, orbax_store, safetensors_file, stacking
from maxtext_ling2.checkpoint.export_hf import Export
from maxtext_ling2.checkpoint.hf_checkpoint import HfCheckpoint
from maxtext_ling2.checkpoint.import_hf import Import
from maxtext_ling2.checkpoint.orbax_store import Storage
from maxtext_ling2.maxtext_api import session

QUIET = Console(quiet=True)
UNCOMPRESSED = Storage()

VARIANTS = {
  "plain": {},
  "q_lora null": {"q_lora_rank": None},
  "two dense layers": {"first_k_dense_replace": 2, "layer_group_size": 3, "num_hidden_layers": 9},
  "trailing layers": {"num_hidden_layers": 8, "layer_group_size": 3},
  "mtp": {"num_nextn_predict_layers": 1},
  "two mtp, one cycle": {"num_nextn_predict_layers": 2, "num_hidden_layers": 2},
  "no qk-norm, no shared expert": {"use_qk_norm": False, "num_shared_experts": 0},
  "all dense": {"first_k_dense_replace": 6},
  "no dense": {"first_k_dense_replace": 0},
}


def to_maxtext(folder, target, save_dtype, storage=UNCOMPRESSED, **settings):
  config = folders.config(folder, **settings)
  Import(folder, config, epath.Path(target), save_dtype).run(storage, QUIET)
  return config


def to_hf(checkpoint, config, target, dtype, tokenizer=None):
  Export(epath.Path(checkpoint), config).run(target, dtype, tokenizer, QUIET)
  return folders.read(target)


@pytest.mark.parametrize(
  "scan", [pytest.param(False, id="unscanned", marks=pytest.mark.slow), pytest.param(True, id="scanned")]
)
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_generated_models(tmp_path, changes, scan):
  folder = folders.write(tmp_path / "hf", **changes)
  config = to_maxtext(folder, tmp_path / "mt" / "0", "bfloat16", scan_layers=scan)
  folders.assert_equal(to_hf(tmp_path / "mt" / "0", config, tmp_path / "back", "bfloat16"), folders.read(folder))


@pytest.mark.parametrize("scan", [False, True], ids=["unscanned", "scanned"])
@pytest.mark.parametrize("case", folders.CASES)
def test_oracle_folders(tmp_path, case, scan):
  folder = folders.GOLDEN / case
  config = to_maxtext(folder, tmp_path / "mt" / "0", "float32", scan_layers=scan)
  folders.assert_equal(to_hf(tmp_path / "mt" / "0" / "items", config, tmp_path / "back", "float32"), folders.read(folder))


@pytest.mark.parametrize("scan", [False, True], ids=["unscanned", "scanned"])
@pytest.mark.parametrize("case", folders.CASES)
def test_what_maxtexts_trainer_restores(tmp_path, case, scan):
  folder = folders.GOLDEN / case
  config = to_maxtext(folder, tmp_path / "mt" / "0", "float32", scan_layers=scan)
  restored = session.restore(config, session.make_mesh(config), str(tmp_path / "mt" / "0" / "items"))
  with HfCheckpoint(folder) as tensors:
    expected = {leaf.path: folders.stacked(leaf, tensors.__getitem__) for leaf in stacking.leaves(config)}
  assert set(restored) == set(expected)
  for path, value in expected.items():
    np.testing.assert_array_equal(np.asarray(restored[path]), value, err_msg="/".join(path))


@pytest.mark.parametrize(
  "scan", [pytest.param(False, id="unscanned", marks=pytest.mark.slow), pytest.param(True, id="scanned")]
)
def test_from_maxtext_and_back(tmp_path, scan):
  changes = VARIANTS["trailing layers"] | {"num_nextn_predict_layers": 1}
  config = to_maxtext(folders.write(tmp_path / "hf", "F32", **changes), tmp_path / "a" / "0", "float32", scan_layers=scan)
  to_hf(tmp_path / "a" / "0", config, tmp_path / "back", "float32")
  to_maxtext(tmp_path / "back", tmp_path / "b" / "0", "float32", scan_layers=scan)
  first, second = (orbax_store.open_arrays(epath.Path(tmp_path / name / "0")) for name in "ab")
  assert list(first) == list(second) and len(first) == len(stacking.leaves(config))
  for path, array in first.items():
    assert array.read().result().tobytes() == second[path].read().result().tobytes(), path


def test_from_one_layout_to_the_other(tmp_path):
  folder = folders.write(tmp_path / "hf", **VARIANTS["trailing layers"])
  scanned = to_maxtext(folder, tmp_path / "a" / "0", "bfloat16", scan_layers=True)
  to_hf(tmp_path / "a" / "0", scanned, tmp_path / "back", "bfloat16")
  unscanned = to_maxtext(tmp_path / "back", tmp_path / "b" / "0", "bfloat16", scan_layers=False)
  folders.assert_equal(to_hf(tmp_path / "b" / "0", unscanned, tmp_path / "again", "bfloat16"), folders.read(folder))


@pytest.mark.parametrize(
  "storage",
  [
    pytest.param(Storage(ocdbt, zarr3, compress), marks=() if ocdbt == zarr3 == compress else pytest.mark.slow)
    for ocdbt in (True, False)
    for zarr3 in (True, False)
    for compress in (True, False)
  ],
  ids=lambda s: "-".join(name for name in ("ocdbt", "zarr3", "compress") if getattr(s, name)) or "plain",
)
def test_every_storage(tmp_path, storage):
  folder = folders.write(tmp_path / "hf")
  config = to_maxtext(folder, tmp_path / "mt" / "0", "bfloat16", storage, scan_layers=True)
  folders.assert_equal(to_hf(tmp_path / "mt" / "0", config, tmp_path / "back", "bfloat16"), folders.read(folder))


def test_small_blocks(tmp_path, monkeypatch):
  """Blocks smaller than one Hugging Face tensor, and ones that cut the stacked axes: as in a model of a real size."""
  folder = folders.write(tmp_path / "hf", **VARIANTS["mtp"])
  original = blocks.block_shape
  monkeypatch.setattr(blocks, "block_shape", lambda leaf, itemsize: original(leaf, itemsize, 300))
  config = to_maxtext(folder, tmp_path / "mt" / "0", "bfloat16", scan_layers=True)
  stores = orbax_store.open_arrays(epath.Path(tmp_path / "mt" / "0"))
  sizes = [np.prod(store.chunk_layout.read_chunk.shape) * 2 for store in stores.values()]
  assert max(sizes) <= 2 * 300
  folders.assert_equal(to_hf(tmp_path / "mt" / "0", config, tmp_path / "back", "bfloat16"), folders.read(folder))


def test_several_files_with_an_index_and_mtp_in_its_own(tmp_path):
  folder = folders.write(tmp_path / "hf", files=3, num_nextn_predict_layers=1)
  assert (folder / "mtp.safetensors").is_file()
  config = to_maxtext(folder, tmp_path / "mt" / "0", "bfloat16")
  folders.assert_equal(to_hf(tmp_path / "mt" / "0", config, tmp_path / "back", "bfloat16"), folders.read(folder))


def test_mtp_of_the_folder_left_out(tmp_path):
  folder = folders.write(tmp_path / "hf", num_nextn_predict_layers=1)
  config = to_maxtext(folder, tmp_path / "mt" / "0", "bfloat16", mtp_num_layers=0)
  back = to_hf(tmp_path / "mt" / "0", config, tmp_path / "back", "bfloat16")
  main = {n: v for n, v in folders.read(folder).items() if not n.startswith("model.layers.6.")}
  assert len(main) < len(folders.read(folder))
  folders.assert_equal(back, main)


@pytest.mark.parametrize("source", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16"])
def test_save_dtype_is_for_all_but_the_router_bias(tmp_path, source, save_dtype):
  folder = folders.write(tmp_path / "hf", source, num_hidden_layers=2)
  config = to_maxtext(folder, tmp_path / "mt" / "0", save_dtype)
  original, found = folders.read(folder), 0
  for path, array in orbax_store.open_arrays(epath.Path(tmp_path / "mt" / "0")).items():
    is_bias = path[-1] == "bias"
    found += is_bias
    assert array.dtype.numpy_dtype.name == ("float32" if is_bias else save_dtype)
  assert found == 1
  back = to_hf(tmp_path / "mt" / "0", config, tmp_path / "back", "float32")
  for name, value in original.items():
    rounded = value if name.endswith("expert_bias") else value.astype(save_dtype)
    assert back[name].tobytes() == rounded.astype(np.float32).tobytes(), name


def test_export_rounds_to_weight_dtype_but_not_the_router_bias(tmp_path):
  folder = folders.write(tmp_path / "hf", "F32")
  config = to_maxtext(folder, tmp_path / "mt" / "0", "float32")
  back = to_hf(tmp_path / "mt" / "0", config, tmp_path / "back", "bfloat16")
  for name, value in folders.read(folder).items():
    expected = value if name.endswith("expert_bias") else value.astype(folders.DTYPES["BF16"])
    assert back[name].dtype == expected.dtype and back[name].tobytes() == expected.tobytes()


def test_nan_and_infinity_are_named_and_kept(tmp_path, caplog):
  folder = folders.write(tmp_path / "hf", "F32")
  tensors = folders.read(folder)
  tensors["model.layers.3.mlp.experts.2.up_proj.weight"][1, 2] = np.nan
  tensors["lm_head.weight"][4, 5] = -np.inf
  folders.save_file(tensors, folder / "model.safetensors")
  with caplog.at_level(logging.WARNING, "maxtext_ling2"):
    config = to_maxtext(folder, tmp_path / "mt" / "0", "float32", scan_layers=True)
  named = {message for message in caplog.messages if "NaN or infinity" in message}
  assert len(named) == 2
  assert any("experts.2.up_proj" in m for m in named) and any("lm_head.weight" in m for m in named)
  folders.assert_equal(to_hf(tmp_path / "mt" / "0", config, tmp_path / "back", "float32"), tensors)


def test_finite_extremes_are_not_taken_for_infinity():
  for dtype in folders.DTYPES.values():
    largest = np.array([np.inf], dtype).view(f"u{np.dtype(dtype).itemsize}") - 1
    values = np.concatenate([largest.view(dtype), -largest.view(dtype), np.zeros(1, dtype), -np.zeros(1, dtype)])
    assert blocks.all_finite(values)
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
      assert not blocks.all_finite(np.append(values, np.array([bad], dtype)))


def test_router_biases_outside_the_parameters_are_exported(tmp_path):
  """The layout of a training state saved without our seam, where router biases stand elsewhere. What MaxText's trainers
  really save with it is tested in test_trainer_checkpoints.py.
  """
  folder = folders.write(tmp_path / "hf", num_nextn_predict_layers=1)
  config = folders.config(folder)
  with HfCheckpoint(folder) as tensors:
    values = {leaf: folders.stacked(leaf, tensors.__getitem__) for leaf in stacking.leaves(config)}
  from maxtext_ling2.checkpoint.import_hf import nested

  weights = nested({leaf.path: value for leaf, value in values.items() if leaf.is_parameter})
  others = nested({leaf.path: value for leaf, value in values.items() if not leaf.is_parameter})
  tree = {"params": {"params": weights}, "nnx_aux": {"model": others}, "opt_state": {"mu": np.ones(3)}, "step": 7}
  from orbax.checkpoint import v1 as ocp

  ocp.save_checkpointables(tmp_path / "mt" / "7", {"items": tree})
  folders.assert_equal(to_hf(tmp_path / "mt" / "7", config, tmp_path / "back", "bfloat16"), folders.read(folder))


CAVEATS = {
  "offset": ({}, {"gla_decay_layer_offset": 1}, "vLLM, SGLang and mlx-lm compute 0"),
  "trailing": ({"num_hidden_layers": 8, "layer_group_size": 3}, {}, "vLLM, SGLang and sglang-jax have no such rule"),
  "no shared experts": ({"num_shared_experts": None}, {}, "vLLM, SGLang and mlx-lm fail on it"),
  "silu": ({"linear_silu": True}, {}, "mlx-lm has no such key"),
  "epsilon": ({"rms_norm_eps": 1e-5}, {}, "norms of MLA's latents"),
  "one expert": ({"num_experts_per_tok": 1}, {}, "vLLM and SGLang normalise"),
}


@pytest.mark.parametrize(("changes", "settings", "words"), CAVEATS.values(), ids=CAVEATS)
def test_one_line_on_what_others_do_not_compute(tmp_path, caplog, changes, settings, words):
  folder = folders.write(tmp_path / "hf", **changes)
  config = to_maxtext(folder, tmp_path / "mt" / "0", "bfloat16", **settings)
  with caplog.at_level(logging.WARNING, "maxtext_ling2"):
    to_hf(tmp_path / "mt" / "0", config, tmp_path / "back", "bfloat16")
  (line,) = (message for message in caplog.messages if "back:" in message)
  assert words in line
  assert hf_config.read(tmp_path / "back")["gla_decay_layer_offset"] == config.gla_decay_layer_offset


def test_shards_and_index(tmp_path, monkeypatch):
  import json

  from maxtext_ling2.checkpoint import export_hf

  monkeypatch.setattr(export_hf, "SHARD_BYTES", 30_000)
  folder = folders.write(tmp_path / "hf")
  config = to_maxtext(folder, tmp_path / "mt" / "0", "bfloat16", scan_layers=True)
  folders.assert_equal(to_hf(tmp_path / "mt" / "0", config, tmp_path / "back", "bfloat16"), folders.read(folder))
  files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
  assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
  index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(value.nbytes for value in folders.read(folder).values())
  assert set(index["weight_map"].values()) == set(files)
  for file in files:
    assert max(spec.end for spec in safetensors_file.read_header(tmp_path / "back" / file)[0].values()) <= 30_000
  to_maxtext(tmp_path / "back", tmp_path / "again" / "0", "bfloat16")  # what we write, we read, the index included
