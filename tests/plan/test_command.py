"""`maxtext-ling2 plan`: options, cache, JSON, table, refusals; and one real program, for chips that are not here."""

import io
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from made_estimates import GIB, option
from rich.console import Console

from maxtext_ling2.host.compile_step import CompilerError
from maxtext_ling2.maxtext_api import recipes
from maxtext_ling2.maxtext_api.start import ConfigError
from maxtext_ling2.plan import command, estimate, search
from maxtext_ling2.plan.chips import CHIPS, TopologyError, chip_of
from maxtext_ling2.plan.search import Candidate

WITHOUT_FLOOR = "copies to the chip's memory"


@pytest.fixture
def unread(monkeypatch, tmp_path):
  """No config of MaxText's: the settings as they are given. The cache is empty."""

  def config(yml, topology, settings, named):
    return SimpleNamespace(get_keys=lambda: {**settings, "base": yml})

  monkeypatch.setattr(command, "planned_config", config)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def made(monkeypatch, unread):
  """What is compiled: [(topology, mesh, settings)]; v5e does not fit, v5p has fewer devices for the same step."""
  calls = []

  def make(yml, topology, mesh, settings, figures):
    calls.append((topology, mesh, settings))
    return option(topology, mesh, fits=topology != "v5e-8", devices=4 if topology == "v5p-8" else 8)

  monkeypatch.setattr(command, "estimate", make)
  return calls


def run(tmp_path, topologies, meshes=("",), words=(), cached=True, model="ling2", **more):
  console = Console(record=True, width=200, file=io.StringIO())
  request = command.Request(model, topologies, meshes, words, cached=cached, **more)
  fits = command.run(console, request, tmp_path / "plan.json", tmp_path / "plan.png")
  return fits, console.export_text(), json.loads((tmp_path / "plan.json").read_text())


def test_time_and_use():
  one = option("v6e-8")
  assert one.lower_seconds == 0.2
  assert one.upper_seconds == 0.5
  assert one.mfu == (pytest.approx(0.32), pytest.approx(0.8))
  assert one.tokens_per_second == (pytest.approx(65536.0), pytest.approx(163840.0))
  assert one.device_seconds_per_token == pytest.approx(8 * 0.5 / 32768)


def test_report(made, tmp_path):
  fits, text, found = run(tmp_path, ["v6e-8", "v5e-8"], ["", "expert=8,context=2"], ["per_device_batch_size=2"])
  assert fits
  assert "cheapest that fits (pessimistic device seconds per token, no prices): v6e-8, fsdp" in text
  assert "does not fit: Used 40G of 31G hbm" in text
  assert [(one["topology"], one["mesh"], one["fits"]) for one in found["options"]] == [
    *(("v6e-8", mesh, True) for mesh in ("", "expert=8,context=2")),
    *(("v5e-8", mesh, False) for mesh in ("", "expert=8,context=2")),
  ]
  assert found["options"][0]["mfu"] == pytest.approx([0.32, 0.8])
  assert found["options"][0]["seconds"] == [0.2, 0.5]
  assert found["versions"]["maxtext"] == "0.2.5"
  assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
  settings = made[1][2]
  assert settings["ici_expert_parallelism"] == "8"
  assert settings["context_parallel_load_balance"] == "false"
  assert settings["per_device_batch_size"] == "2"
  assert "ici_expert_parallelism" not in made[0][2]


def test_parts(made, tmp_path):
  """A row each, with floor, bytes, times and what bounds it; what was assumed of several conditionals stands once."""
  _, text, found = run(tmp_path, ["v6e-8"])
  rows = [line.replace("│", " ").split() for line in text.splitlines()]
  assert ["experts", "60.0", "90.0", "200.0", "100.0", "0.0", "250.0", "compute"] in rows
  assert ["collectives", "10.0", "0.0", "10.0", "200.0", "250.0", "ICI"] in rows
  assert "parts, pessimistic (links: 50% of a chip's)" in text
  assert "2 x conditional: branch 0" in text
  assert "3.0 (1.0)" in text  # GiB sent, synchronously
  (experts, collectives) = found["options"][0]["parts"]
  assert (experts["bound"], experts["floor_seconds"], experts["bytes_accessed"]) == ("compute", 0.06, 9e10)
  assert (collectives["bound"], collectives["floor_seconds"]) == ("ICI", None)  # no NaN in JSON


def test_recipe(made, tmp_path):
  """The recipe's own batch and mesh stay, and the command that trains with it is printed."""
  _, text, found = run(tmp_path, ["v5p-64"], recipe="ling2-v5p-64", words=["steps=3"])
  ((topology, mesh, settings),) = made
  assert (topology, mesh) == ("v5p-64", "recipe ling2-v5p-64")
  assert settings == {
    "compile_topology_num_slices": "1",
    "log_config": "false",
    "jax_cache_dir": '""',
    "model_name": "ling2",
    "steps": "3",
  }
  file = recipes.file_of("ling2-v5p-64")
  assert f"python -m maxtext.trainers.pre_train.train {file} model_name=ling2 steps=3" in text.replace("\n", "")
  assert found["options"][0]["mesh"] == "recipe ling2-v5p-64"


def test_a_yml_of_the_users_keeps_its_own_values(made, tmp_path):
  """Also those that it inherits; plan's defaults are for what it does not say."""
  (tmp_path / "parent.yml").write_text("base_config: base.yml\nscan_layers: false\ncompile_topology_num_slices: 2\n")
  (tmp_path / "mine.yml").write_text("base_config: parent.yml\nmodel_name: ling2\nper_device_batch_size: 4\n")
  run(tmp_path, ["v6e-8"], model=str(tmp_path / "mine.yml"))
  settings = made[0][2]
  own = {"scan_layers": "false", "compile_topology_num_slices": "2", "per_device_batch_size": "4", "model_name": "ling2"}
  assert {key: settings[key] for key in own} == own and settings["override_model_config"] == "true"
  (tmp_path / "recipe.yml").write_text("base_config: mine.yml\n")
  with pytest.raises(ValueError, match=r"it is for ling2, not for ling2\.6-flash"):
    run(tmp_path, ["v6e-8"], model="ling2.6-flash", recipe=str(tmp_path / "recipe.yml"))
  with pytest.raises(ValueError, match=r"mine\.yaml: MaxText takes a base yml only under a name that ends in \.yml"):
    run(tmp_path, ["v6e-8"], model="mine.yaml")


def test_recipe_of_another_model(made, tmp_path):
  with pytest.raises(ValueError, match=r"--recipe ling2-v5p-64: it is for ling2, not for ling2\.6-flash"):
    run(tmp_path, ["v5p-64"], model="ling2.6-flash", recipe="ling2-v5p-64")
  with pytest.raises(ValueError, match="ling2-v9: no such recipe; use one of ling2-tpu7x-64"):
    run(tmp_path, ["v5p-64"], recipe="ling2-v9")


def test_search(made, tmp_path, monkeypatch):
  """The topology's recipe, then the best by arithmetic until two fit."""
  ranked = [Candidate(mesh, "4", 0.1, GIB, 1e-6) for mesh in ("expert=16", "", "expert=8", "tensor=4")]
  monkeypatch.setattr(search, "ranked", lambda *_: ranked)
  monkeypatch.setattr(command, "estimate", lambda yml, topology, mesh, *_: option(topology, mesh, "16" not in mesh))
  _, text, found = run(tmp_path, ["v5p-64"], search=True)
  assert [(one["mesh"], one["fits"]) for one in found["options"]] == [
    ("recipe ling2-v5p-64", True),
    *[("expert=16, 4 rows", False), ("fsdp, 4 rows", True), ("expert=8, 4 rows", True)],
  ]
  _, _, found = run(tmp_path, ["v5p-128"], search=True)  # has no recipe
  assert len(found["options"]) == 3
  assert "ranked by arithmetic" in text and "tensor=4, 4 rows" in text


def test_what_the_compiler_cannot_make(tmp_path, monkeypatch, unread):
  """Such as a SparseCore kernel that wants more memory than there is: named, and no traceback."""

  def refuse(yml, words):
    raise CompilerError("INTERNAL: Failed to run MLO pass\npipeline sc_ragged_gather_reduce_v2.6")

  monkeypatch.setattr(estimate, "compile_step", refuse)
  for _ in range(2):  # the second time from the cache
    fits, text, found = run(tmp_path, ["v6e-8"])
    assert not fits and "nothing fits" in text
    assert "this program cannot be compiled: INTERNAL: Failed to run MLO pass pipeline sc_ragged" in text
    assert "does not fit" not in text and "? of 32.0" in text
    assert found["options"][0]["memory"] is None


def test_one_refused_mesh_does_not_lose_the_others(tmp_path, monkeypatch, unread):
  """Named in its row; alone it is an error."""

  def make(yml, topology, mesh, settings, figures):
    if mesh == "expert=8":
      raise ConfigError("MaxText refuses this configuration: Failed to find assignment")
    return option(topology, mesh, True)

  monkeypatch.setattr(command, "estimate", make)
  fits, text, found = run(tmp_path, ["v6e-16"], meshes=["expert=8", "expert=4"])
  assert fits and "expert=8: MaxText refuses this configuration: Failed" in text
  assert [(one["mesh"], one["fits"], one["devices"]) for one in found["options"]] == [
    *[("expert=8", False, 16), ("expert=4", True, 8)],
  ]
  with pytest.raises(ConfigError, match="Failed to find assignment"):
    run(tmp_path, ["v6e-16"], meshes=["expert=8"])


def test_nothing_fits(made, tmp_path):
  fits, text, _ = run(tmp_path, ["v5e-8"])
  assert not fits
  assert "nothing fits" in text


def test_cache(made, tmp_path):
  for _ in range(2):
    _, _, found = run(tmp_path, ["v6e-8"])
  assert len(made) == 1
  assert found["options"][0]["tokens_per_second"][1] == pytest.approx(163840.0)
  run(tmp_path, ["v6e-8"], words=["max_target_length=8192"])
  assert len(made) == 2
  run(tmp_path, ["v6e-8"], cached=False)
  assert len(made) == 3


@pytest.mark.parametrize(
  ("arguments", "why"),
  [
    ({"meshes": ["expart=8"]}, "'expart' is not an axis"),
    ({"meshes": ["expert=0"]}, "expert has size '0'"),
    ({"words": ["batch"]}, "write KEY=VALUE"),
    ({"model": "nowhere.yml"}, "nowhere.yml: no such file"),
    ({"words": ["compile_topology=v5p-64"]}, "compile_topology=v5p-64: this command takes it from --topology"),
  ],
)
def test_bad_input(made, tmp_path, arguments, why):
  with pytest.raises(ValueError, match=why):
    run(tmp_path, ["v6e-8"], **arguments)
  assert not made
  assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize("topology", ["h100-8", "v6e", "v6e-7", "", "v9-8"])
def test_unknown_topology(topology):
  with pytest.raises(TopologyError, match="--topology"):
    estimate.estimate("base.yml", topology, "", {})


def test_chips():
  assert chip_of("tpu7x-64") is CHIPS["tpu7x"]
  assert chip_of("v5e-256").memory == 16 * GIB


@pytest.mark.parametrize(
  "text",
  [
    "RESOURCE_EXHAUSTED: ... Used 39.30G of 31.25G hbm. Exceeded hbm capacity by 8.05G.",
    "... total memory required for HLO temporaries (39.30G) exceeds available HBM (31.25G). HLO module: jit_train_step.",
  ],
)
def test_out_of_memory_text(text):
  assert estimate._out_of_memory(text, CHIPS["v6e"]) == (39.3 * GIB, 31.25 * GIB)


def plan_of_tiny(tmp_path, topology, *words):
  """What `plan` finds for ling2-tiny on short rows, in a process of its own."""
  file = tmp_path / "plan.json"
  command_line = ["plan", "ling2-tiny", "--topology", topology, "--json", str(file), "max_target_length=256", *words]
  environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
  done = subprocess.run(
    [sys.executable, "-m", "maxtext_ling2", *command_line], env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]
  (one,) = json.loads(file.read_text())["options"]
  return one


@pytest.mark.slow  # docs_test compiles one, too
def test_a_real_program(tmp_path):
  """ling2-tiny for four v5e chips: GLA's kernels are in it, parameters with Adam are 12 bytes each, cut in four."""
  one = plan_of_tiny(tmp_path, "v5e-4", "scan_layers=false")
  assert one["fits"] and one["devices"] == 4 and one["tokens"] == 4 * 256
  assert 0 < one["mfu"][0] <= one["mfu"][1] <= 1
  assert one["memory"] < one["capacity"]
  assert one["bytes_accessed"] > 2 * one["arguments"]  # every parameter and its two moments are read and written
  assert "all-gather" in one["collectives"]
  assert one["edge_share"] == 0.5  # 2 x 2 chips, not closed to a ring: two of four links
  parts = {part["name"]: part for part in one["parts"]}
  assert math.fsum(part["bytes_accessed"] for part in one["parts"]) == pytest.approx(one["bytes_accessed"], rel=1e-12)
  assert math.fsum(part["seconds"] for part in one["parts"]) == pytest.approx(one["pessimistic_seconds"], rel=1e-12)
  assert {"GLA", "experts", "router", "MLA", "logits and loss", "collectives"} <= set(parts)
  assert all(part["floor_seconds"] > 0 for name, part in parts.items() if name not in ("other", WITHOUT_FLOOR))
  sent = sum(size for _, size in one["collectives"].values())
  assert parts["collectives"]["ici_seconds"] == pytest.approx(sent / 100e9)
  assert one["ici_seconds"] == pytest.approx(sent / 200e9)
  assert one["collective_bytes"] <= parts["collectives"]["bytes_accessed"]


@pytest.mark.slow
def test_two_slices_and_the_ragged_exchange_of_tokens(tmp_path):
  """Two slices of four v5e chips, data parallel between them, experts cut in four within each, MaxText's default way."""
  slices = ("compile_topology_num_slices=2", "dcn_data_parallelism=2", "dcn_fsdp_parallelism=1")
  experts = ("ici_fsdp_parallelism=1", "ici_expert_parallelism=4")
  one = plan_of_tiny(tmp_path, "v5e-4", "scan_layers=true", *slices, *experts)
  assert one["fits"] and one["devices"] == 8 and one["tokens"] == 8 * 256
  assert "ragged-all-to-all" in one["collectives"]
  gradients = one["arguments"] / 3  # of float32 weights; their moments are twice as much
  reduced = sum(size for kind, (_, size) in one["collectives"].items() if kind in ("all-reduce", "reduce-scatter"))
  assert reduced > 0.9 * gradients  # the slices add their gradients


def test_a_mesh_that_the_chips_cannot_form(tmp_path):
  """16 v6e chips are 4 x 4: no axis of 8."""
  command_line = [
    "plan",
    "ling2-tiny",
    "--topology",
    "v6e-16",
    "--mesh",
    "expert=8",
    "--json",
    str(tmp_path / "plan.json"),
  ]
  done = subprocess.run([sys.executable, "-m", "maxtext_ling2", *command_line], capture_output=True, text=True)
  assert done.returncode == 1
  assert "MaxText refuses this configuration: Failed to find assignment for logical_axis_index" in done.stderr
  assert "Traceback" not in done.stderr
  assert not (tmp_path / "plan.json").exists()
