"""The cache of `plan`: whatever changes the figures changes the key, from MaxText's own config; nothing is compiled."""

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from maxtext_ling2 import kept
from maxtext_ling2.host.compile_step import compile_step
from maxtext_ling2.plan import cache, command
from maxtext_ling2.plan.bounds import Part
from maxtext_ling2.plan.estimate import Estimate
from maxtext_ling2.plan.resolved import planned_config
from maxtext_ling2.plugin import REGISTRY


def key(model="ling2", topology="v6e-8", mesh="", **settings):
  yml, words = command._model(model)
  return cache.key(planned_config(yml, topology, words | settings, None), topology, mesh)


@pytest.fixture(scope="module")
def first():
  return key()


def test_the_same_plan_has_the_same_key_in_another_process(first):
  program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_cache import key; print(key())"
  done = subprocess.run(
    [sys.executable, "-c", program],
    stdout=subprocess.PIPE,
    check=True,
    text=True,
    env=os.environ | {"PYTHONHASHSEED": "1"},
  )
  assert first == key() == done.stdout.split()[-1]


@pytest.mark.parametrize(
  "changes",
  [
    {"topology": "v6e-16"},
    {"mesh": "expert=8"},
    {"model": "ling2.6-flash"},
    {"max_target_length": "8192"},
    {"remat_policy": "minimal"},
  ],
)
def test_arguments(first, changes):
  assert key(**changes) != first


def test_the_models_yaml(first, tmp_path, monkeypatch):
  """Another number of experts in a copy of ling2.yml, which the seam reads in place of ours."""
  (seam,) = (seam for seam in REGISTRY.seams if hasattr(seam, "folder"))
  copy = tmp_path / "configs"
  shutil.copytree(seam.folder, copy)
  monkeypatch.setattr(seam, "folder", copy)
  assert key() == first  # the folder itself is no part of it
  file = copy / "models" / "ling2.yml"
  file.write_text(file.read_text().replace("num_experts: 256", "num_experts: 128"))
  assert key() != first


def test_a_base_yaml_and_its_parents(tmp_path):
  """Three generations above MaxText's base.yml: a change in each gives another key, undoing it the first one."""
  files = [tmp_path / f"{name}.yml" for name in ("mine", "parent", "grandparent")]
  for file, parent in zip(files, [*(file.name for file in files[1:]), "base.yml"], strict=True):
    file.write_text(f"base_config: {parent}\n" + "model_name: ling2\n" * (file.stem == "mine"))
  first, keys = key(str(files[0])), set()
  for file in files:
    text = file.read_text()
    file.write_text(f"{text}learning_rate: 0.{len(file.stem)}\n")
    keys.add(key(str(files[0])))
    file.write_text(text)
  assert len(keys | {first}) == 4
  assert key(str(files[0])) == first


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("M_REMAT_POLICY", "minimal"),
    ("M_GLA_DECAY_LAYER_OFFSET", "1"),
    ("XLA_FLAGS", "--xla_dump_max_hlo_modules=3"),
    ("LIBTPU_INIT_ARGS", "--xla_tpu_enable_async_collective_fusion=false"),
    ("JAX_DEFAULT_MATMUL_PRECISION", "highest"),
  ],
)
def test_variables(first, monkeypatch, name, value):
  monkeypatch.setenv(name, value)
  assert key() != first


@pytest.mark.parametrize(
  "name", ["LANG", "HF_TOKEN", "M_NOTHING_OF_THIS_NAME", "JAX_COMPILATION_CACHE_DIR", "TPU_STDERR_LOG_LEVEL"]
)
def test_variables_without_effect(first, monkeypatch, name):
  monkeypatch.setenv(name, "1")
  assert key() == first


def test_a_compilation_leaves_the_environment_as_it_was(first, monkeypatch):
  """MaxText appends to LIBTPU_INIT_ARGS in each step, and sets XLA_FLAGS where it is not set."""
  from maxtext.trainers.pre_train import train_compile

  class Compiled(Exception):
    pass

  def main(argv):
    os.environ["LIBTPU_INIT_ARGS"] = "--xla_tpu_spmd_rng_bit_generator_unsafe=true"
    raise Compiled

  monkeypatch.setattr(train_compile, "main", main)
  with pytest.raises(Compiled):
    compile_step("base.yml", [])
  assert key() == first


def test_reading_a_config_leaves_the_environment_as_it_was(monkeypatch):
  """Flags of the user's in dump_hlo_xla_flags reach XLA_FLAGS; MaxText refuses the second config of a process then."""
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  flags = {"dump_hlo_xla_flags": "--xla_dump_to=there"}
  assert key(**flags) == key(**flags) != key()
  assert "XLA_FLAGS" not in os.environ


@pytest.mark.parametrize("field", ["run_name", "base_output_directory"])
def test_where_a_run_writes(first, tmp_path, field):
  """Without a name MaxText takes the minute of the clock, so that a key was good for a minute."""
  assert key(**{field: str(tmp_path)}) == first


@pytest.mark.parametrize("package", ["maxtext-ling2", "maxtext", "jax", "jaxlib", "libtpu"])
def test_versions(first, monkeypatch, package):
  installed = importlib.metadata.version

  monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == package else installed(name))
  assert key() != first


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
  def version(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "version", version)
  assert set(cache.versions().values()) == {""}


def test_sources(first, monkeypatch):
  """The digest of both packages' sources is part of the key."""
  monkeypatch.setattr(cache, "_sources", lambda: ("another", "one"))
  assert key() != first


def test_a_digest_of_files(tmp_path):
  """It sees the bytes, the names and the number of the files with a suffix, and no other file."""
  for name in ("a.py", "inner/b.py", "notes.txt"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(name)
  seen = [kept.digest_of(tmp_path, (".py",))]
  (tmp_path / "notes.txt").write_text("other notes")
  assert kept.digest_of(tmp_path, (".py",)) == seen[0]
  (tmp_path / "inner" / "b.py").write_text("changed")
  seen.append(kept.digest_of(tmp_path, (".py",)))
  (tmp_path / "a.py").rename(tmp_path / "c.py")
  seen.append(kept.digest_of(tmp_path, (".py",)))
  (tmp_path / "d.py").touch()
  seen.append(kept.digest_of(tmp_path, (".py",)))
  assert len(set(seen)) == 4


def test_an_estimate_is_kept(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  part = Part("experts", 9e10, 0.2, 0.1, 0.0, 0.25)  # its floor is NaN
  one = Estimate("v6e-8", "", 8, True, 40.0, 31.0, kernels={"gmm": (2, 3.0)}, parts=(part,), assumed=("a",))
  assert cache.read("key") is None
  cache.write("key", one)
  known = cache.read("key")
  assert (type(known), type(known.parts[0]), known.assumed) == (Estimate, Part, ("a",))
  assert json.dumps(dataclasses.asdict(known)) == json.dumps(dataclasses.asdict(one))
  assert [path.name for path in (tmp_path / "maxtext-ling2" / "plan").iterdir()] == ["key.json"]
