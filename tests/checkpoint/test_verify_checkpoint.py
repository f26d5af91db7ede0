"""`maxtext-ling2 verify` with a MaxText checkpoint: equal ones pass, and a single wrong bit is named."""

import folders
import numpy as np
import pytest
from etils import epath
from rich.console import Console
from typer.testing import CliRunner

from maxtext_ling2.checkpoint import blocks
from maxtext_ling2.checkpoint.import_hf import Import
from maxtext_ling2.checkpoint.orbax_store import Storage
from maxtext_ling2.cli import app
from maxtext_ling2.verify import tensors

QUIET = Console(quiet=True)
NAME = "model.layers.3.mlp.experts.2.down_proj.weight"


def converted(folder, target, save_dtype, **settings):
  config = folders.config(folder, **settings)
  Import(folder, config, epath.Path(target), save_dtype).run(Storage(), QUIET)
  return config


@pytest.mark.parametrize("scan", [False, True], ids=["unscanned", "scanned"])
@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16"])
def test_a_conversion_is_bit_equal(tmp_path, scan, save_dtype):
  folder = folders.write(tmp_path / "hf", "F32", num_nextn_predict_layers=1)
  config = converted(folder, tmp_path / "0", save_dtype, scan_layers=scan)
  reports = tensors.compare(tmp_path / "0", folder, config)
  assert {report.name for report in reports} == set(folders.read(folder))
  assert all(report.passed and report.max_abs_error == 0 for report in reports)
  assert sum(report.elements for report in reports) == sum(value.size for value in folders.read(folder).values())


def test_one_wrong_element_is_found(tmp_path):
  folder = folders.write(tmp_path / "hf", "F32")
  config = converted(folder, tmp_path / "0", "float32", scan_layers=True)
  weights = folders.read(folder)
  weights[NAME][3, 4] += 0.5
  folders.save_file(weights, folder / "model.safetensors")
  wrong = [report for report in tensors.compare(tmp_path / "0", folder, config) if not report.passed]
  (report,) = wrong
  assert (report.name, report.different, report.elements) == (NAME, 1, weights[NAME].size)
  assert report.max_abs_error == pytest.approx(0.5, abs=1e-6)


def test_a_nan_counts_as_an_infinite_difference_of_its_own_kind():
  report = tensors.TensorReport("x", "float32", "float32")
  ours = np.array([1, np.nan, np.nan], np.float32)
  report.add(ours, np.array([1, 2, np.nan], np.float32))
  assert report.different == 1 and np.isnan(report.max_abs_error)
  assert np.array_equal(blocks.bits(ours), ours.view(np.uint32))


def invoke(*words):
  return CliRunner().invoke(app, ["verify", *map(str, words)], terminal_width=200)


@pytest.mark.parametrize(
  ("case", "layout"),
  [
    pytest.param("trailing_mtp", ["--scan"], id="trailing_mtp-scanned"),
    pytest.param("trailing_mtp", [], id="trailing_mtp-unscanned", marks=pytest.mark.slow),
    pytest.param("one_cycle", [], id="one_cycle-unscanned", marks=pytest.mark.slow),
  ],
)
def test_via_orbax(case, layout):
  """Through MaxText's own conversion command and MaxText's own restore, to the recorded logits."""
  folder = folders.GOLDEN / case
  found = invoke(folder, "--reference", folder / "io_short.npz", "--decay-offset", 1, "--via-orbax", *layout)
  assert found.exit_code == 0, found.output
  count = len(folders.read(folder))
  assert f"{count} of {count} tensors bit-equal" in found.output and "PASS" in found.output


@pytest.mark.slow
def test_a_checkpoint_without_a_reference(tmp_path):
  folder = folders.write(tmp_path / "hf", "F32", num_nextn_predict_layers=1)
  converted(folder, tmp_path / "0", "bfloat16")
  found = invoke(folder, "--orbax", tmp_path / "0")
  assert found.exit_code == 0, found.output
  assert "max abs error 0.000e+00" in found.output


@pytest.mark.slow
def test_relative_paths(tmp_path, monkeypatch):
  """Orbax takes none; a user types them."""
  folder = folders.write(tmp_path / "hf", "F32")
  converted(folder, tmp_path / "0", "float32")
  monkeypatch.chdir(tmp_path)
  found = invoke("hf", "--orbax", "0/items")
  assert found.exit_code == 0, found.output


def test_a_checkpoint_of_other_weights_fails_with_a_table(tmp_path, monkeypatch):
  folder = folders.write(tmp_path / "hf", "F32")
  converted(folder, tmp_path / "0", "float32")
  tensors = folders.read(folder)
  tensors[NAME] += 1
  folders.save_file(tensors, folder / "model.safetensors")
  monkeypatch.chdir(tmp_path)
  found = invoke("hf", "--orbax", "0")  # relative paths, of which Orbax takes none
  assert found.exit_code == 1 and "FAIL" in found.output
  assert "the worst tensors" in found.output and f"{tensors[NAME].size} of {tensors[NAME].size}" in found.output
  assert f"{len(tensors) - 1} of {len(tensors)} tensors bit-equal" in found.output


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ([], "nothing to compare with"),
    (["--orbax", "/nowhere"], "/nowhere: no such folder"),
  ],
)
def test_what_it_cannot_compare(words, message):
  found = invoke(folders.GOLDEN / "one_cycle", *words)
  assert found.exit_code != 0
  assert message in " ".join(found.output.replace("│", " ").split())
