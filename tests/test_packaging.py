"""What the built distributions hold, what installers make of them, and that each fact of the packaging has one home."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path

import pytest

import maxtext_ling2
from maxtext_ling2 import constraints
from maxtext_ling2.discovery import GROUP, OWN_ENTRY
from sandbox import ROOT, SITE_FILES, Environment, put_package

BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", ".gitignore", "maxtext_ling2", "site_files")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SITE_FILE_NAMES = {file.name for file in SITE_FILES.iterdir()}


def build(source: Path, kind: str, target: Path) -> Path:
  """Build a distribution with this environment's hatchling, as an installer does but without asking a registry."""
  code = f"import sys, hatchling.build as backend; print(backend.build_{kind}(sys.argv[1]))"
  target.mkdir(exist_ok=True)
  done = subprocess.run([sys.executable, "-c", code, target], cwd=source, check=True, capture_output=True, text=True)
  return target / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A copy of what the distributions are built from."""
  folder = tmp_path_factory.mktemp("checkout")
  for name in BUILT_FROM:
    path = ROOT / name
    if path.is_dir():
      shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
      shutil.copy(path, folder)
  return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  return build(checkout, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module", params=["wheel", "wheel from sdist", "editable"])
def installed(
  request: pytest.FixtureRequest, checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Environment]:
  """An environment into which pip installed the distribution, with stand-ins for what needs MaxText or JAX."""
  folder = tmp_path_factory.mktemp("installed")
  source = shutil.copytree(checkout, folder / "source")
  shutil.rmtree(source / "maxtext_ling2")
  put_package(source)
  if request.param == "wheel from sdist":
    archive = build(source, "sdist", folder / "dist")
    shutil.unpack_archive(archive, folder / "unpacked", filter="data")
    source = next((folder / "unpacked").iterdir())
  environment = Environment(folder / "venv")
  distribution = build(source, "editable" if request.param == "editable" else "wheel", folder / "dist")
  pip(environment, "install", "--quiet", "--no-deps", "--no-index", str(distribution))
  return environment


def pip(environment: Environment, *arguments: str) -> None:
  """Run this environment's pip on another one, with no configuration of the machine."""
  command = [sys.executable, "-m", "pip", "--isolated", "--python", str(environment.python), *arguments]
  subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PIP_CONFIG_FILE": os.devnull})


# Contents


def test_the_wheel_holds_the_package_its_data_and_the_site_files(wheel: Path) -> None:
  names = set(zipfile.ZipFile(wheel).namelist())
  package = ROOT / "maxtext_ling2"
  patterns = ("*.py", "*.yml", "constraints.txt")
  expected = {str(file.relative_to(ROOT)) for pattern in patterns for file in package.rglob(pattern)}
  assert expected | {"maxtext_ling2/py.typed"} | SITE_FILE_NAMES <= names
  assert any(name.startswith("maxtext_ling2/configs/models/") and name.endswith(".yml") for name in names)
  others = {name.split("/")[0] for name in names} - {"maxtext_ling2"} - SITE_FILE_NAMES
  assert len(others) == 1 and others.pop().endswith(".dist-info")


def test_the_metadata_says_what_pyproject_says(wheel: Path) -> None:
  archive = zipfile.ZipFile(wheel)
  info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA")).removesuffix("METADATA")
  entry_points = configparser.ConfigParser()
  entry_points.read_string(archive.read(f"{info}entry_points.txt").decode())
  assert dict(entry_points["console_scripts"]) == {"maxtext-ling2": "maxtext_ling2.cli:main"}
  assert dict(entry_points[GROUP]) == {OWN_ENTRY.name: OWN_ENTRY.value}
  assert {f"{info}licenses/LICENSE", f"{info}licenses/NOTICE"} <= set(archive.namelist())
  metadata = archive.read(f"{info}METADATA").decode()
  assert {"License-Expression: Apache-2.0", "Requires-Python: >=3.12"} <= set(metadata.splitlines())


# Installed


def test_site_files_lie_where_python_looks_for_them(installed: Environment) -> None:
  for name in SITE_FILE_NAMES:
    assert (installed.site / name).read_text() == (SITE_FILES / name).read_text()
  distribution = Distribution.at(next(installed.site.glob("maxtext_ling2-*.dist-info")))
  assert {str(file) for file in distribution.files or []} >= SITE_FILE_NAMES


def test_an_installed_plugin_registers(installed: Environment) -> None:
  answer = installed.ask("""
    import maxtext
    from maxtext_ling2 import discovery, startup
    answer = [startup.found_by, maxtext.registered] + [[r.version, r.state] for r in discovery.plugins]
  """)
  assert answer == ["pth", ["ling2"], [maxtext_ling2.__version__, "loaded"]]


def test_the_console_script_is_there(installed: Environment) -> None:
  script = installed.python.with_name("maxtext-ling2")
  assert installed.run(script, "doctor").stdout == "command line ['doctor']\n"


def test_a_wheel_alone_says_where_its_constraints_are(wheel: Path, tmp_path: Path) -> None:
  """Nothing else is installed then: `pip install --no-deps`, and the path goes into the next `pip install -c`."""
  environment = Environment(tmp_path / "venv")
  pip(environment, "install", "--quiet", "--no-deps", "--no-index", str(wheel))
  done = environment.run("-m", "maxtext_ling2", "constraints")
  assert (done.returncode, done.stderr) == (0, "")
  assert Path(done.stdout.strip()).read_text() == constraints.PATH.read_text()


def test_uninstalling_leaves_nothing(checkout: Path, wheel: Path, tmp_path: Path) -> None:
  environment = Environment(tmp_path / "venv")
  before = set(environment.site.iterdir())
  pip(environment, "install", "--quiet", "--no-deps", "--no-index", str(wheel))
  assert set(environment.site.iterdir()) > before
  pip(environment, "uninstall", "--yes", "maxtext-ling2")
  assert set(environment.site.iterdir()) == before


# One home for each fact


def tracked_files() -> list[Path]:
  """What git tracks or would track; every file where this is no checkout."""
  command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  if done.returncode:
    return [path for name in BUILT_FROM for path in [ROOT / name, *(ROOT / name).rglob("*")] if path.is_file()]
  return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_version_has_one_home() -> None:
  assert "version" not in PROJECT and "version" in PROJECT["dynamic"]
  assert "maxtext-ling2" not in constraints.PATH.read_text()  # it has versions of others, one may be the same
  sources = [path for path in tracked_files() if path.suffix in (".py", ".toml", ".yml", ".pth", ".start")]
  homes = [path.relative_to(ROOT) for path in sources if maxtext_ling2.__version__ in path.read_text()]
  assert homes == [Path("maxtext_ling2/__init__.py")]


def test_our_entry_point_has_the_same_value_in_the_code() -> None:
  assert PROJECT["entry-points"] == {GROUP: {OWN_ENTRY.name: OWN_ENTRY.value}}


def test_no_tracked_file_holds_the_address_of_a_registry() -> None:
  address = re.compile(
    r"index[-_]url|find[-_]links|/simpl[e]/|pypi[.]org|pythonhoste[d]|registr[y] *= *[\"']?http", re.IGNORECASE
  )
  files = tracked_files()
  assert ROOT / "pyproject.toml" in files and constraints.PATH in files
  texts = {path: path.read_bytes().decode(errors="ignore") for path in files}
  assert [str(path) for path, text in texts.items() if address.search(text)] == []


def test_constraints_are_names_and_versions_and_cover_what_we_ask_for() -> None:
  lines = [line for line in constraints.PATH.read_text().splitlines() if not line.startswith("#")]
  pinned = {line.split("==")[0] for line in lines if re.fullmatch(r"[a-z0-9-]+==[a-z0-9.+]+", line)}
  assert len(pinned) == len(lines) and not any(name.startswith("nvidia") for name in pinned)
  wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
  assert {re.split(r"[^a-z0-9-]", requirement)[0] for requirement in wanted} <= pinned


# Set-up


def fake_python(path: Path, *, works: bool) -> Path:
  """Something that looks like an interpreter, says that it is new enough (or not), and makes no environment."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/bin/sh\ncase $1 in -c) exit {0 if works else 127};; --version) echo Python 3;; *) exit 1;; esac\n")
  path.chmod(0o755)
  return path


def set_up(folder: Path, **variables: Path | str) -> subprocess.CompletedProcess[str]:
  """Run the set-up with nothing on PATH but what the test put into ``folder/bin``."""
  (folder / "bin").mkdir(exist_ok=True)
  environ = {"PATH": f"{folder / 'bin'}", "HOME": str(folder), "PYENV_ROOT": str(folder / "pyenv")}
  environ |= {name: str(value) for name, value in variables.items()}
  command = [ROOT / "scripts" / "set_up", folder / "venv"]
  return subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True)


def test_set_up_without_a_python_says_what_it_looked_for_and_the_way_out(tmp_path: Path) -> None:
  fake_python(tmp_path / "bin" / "python3.12", works=False)  # as pyenv's shims are for versions that are not active
  done = set_up(tmp_path)
  assert done.returncode == 1 and not (tmp_path / "venv").exists()
  for part in ("no CPython 3.12 or newer", "python3.12", str(tmp_path / "pyenv" / "versions"), "make PYTHON="):
    assert part in done.stderr


def test_set_up_passes_over_a_shim_that_fails(tmp_path: Path) -> None:
  fake_python(tmp_path / "bin" / "python3.12", works=False)
  fake_python(tmp_path / "bin" / "python3.13", works=True)
  found = fake_python(tmp_path / "pyenv" / "versions" / "3.12.9" / "bin" / "python", works=True)
  assert f"({found})" in set_up(tmp_path).stdout


def test_set_up_takes_a_newer_python_rather_than_none(tmp_path: Path) -> None:
  found = fake_python(tmp_path / "pyenv" / "versions" / "3.17.0" / "bin" / "python", works=True)
  assert f"({found})" in set_up(tmp_path).stdout


def test_set_up_uses_the_python_that_it_is_told_to_use(tmp_path: Path) -> None:
  fake_python(tmp_path / "bin" / "python3.12", works=True)
  mine = fake_python(tmp_path / "mine", works=True)
  assert f"({mine})" in set_up(tmp_path, PYTHON=mine).stdout
  done = set_up(tmp_path, PYTHON=fake_python(tmp_path / "old", works=False))
  assert done.returncode == 1 and f"PYTHON={tmp_path / 'old'}" in done.stderr


def test_a_set_up_that_fails_is_done_again(tmp_path: Path) -> None:
  (tmp_path / "maxtext_ling2").mkdir()
  for name in ("Makefile", "pyproject.toml", "maxtext_ling2/constraints.txt", "scripts", "site_files"):
    path = ROOT / name
    (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / name)
  python = fake_python(tmp_path / "python", works=True)
  for _ in range(2):
    done = subprocess.run(["make", "setup", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "creating .venv" in done.stdout
  assert not list(tmp_path.rglob(".maxtext-ling2-ready"))
