"""Small virtual environments in which a few lines of Python stand for MaxText, so that a test takes milliseconds."""

import json
import os
import shutil
import subprocess
import sysconfig
import textwrap
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SITE_FILES = ROOT / "site_files"

# What the start-up consists of. The rest of the package needs JAX and MaxText and has no part in these tests.
START_UP = ("__init__.py", "__main__.py", "startup.py", "discovery.py", "run_module.py")

OWN = "ling2 = maxtext_ling2.plugin:register"
"""The entry point of this package."""

REGISTER = """
  def register():
    import maxtext
    maxtext.registered.append({name!r})
"""


class Environment:
  """A fresh virtual environment with a stand-in for MaxText, which keeps a list of the plugins that registered."""

  def __init__(self, folder: Path) -> None:
    venv.create(folder, symlinks=True)
    self.folder = folder
    self.python = folder / "bin" / "python"
    self.site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    self.write("maxtext/__init__.py", "registered = []")
    self.write("maxtext/sub.py", "import maxtext\nseen = list(maxtext.registered)")

  def write(self, path: str, text: str) -> Path:
    """Write a file into site-packages."""
    file = self.site / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text))
    return file

  def install(self) -> "Environment":
    """Put this package in as an installer does: start-up modules with stand-ins, site files, metadata."""
    put_package(self.site)
    for file in SITE_FILES.iterdir():
      shutil.copy(file, self.site)
    self.add_distribution("maxtext-ling2", "1.0", OWN)
    return self

  def add_plugin(self, name: str, *, distribution: str | None = None, version: str = "1.0") -> None:
    """Add a plugin module and the distribution that offers it."""
    self.write(f"{name}_plugin.py", REGISTER.format(name=name))
    self.add_distribution(distribution or f"maxtext-{name}", version, f"{name} = {name}_plugin:register")

  def add_distribution(self, name: str, version: str, entry: str, site: Path | None = None) -> Path:
    """Add metadata that offers one entry point of the group."""
    folder = (site or self.site) / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "entry_points.txt").write_text(f"[maxtext.plugins]\n{entry}\n")
    return folder

  def run(self, *arguments: str | Path, **variables: str | Path) -> subprocess.CompletedProcess[str]:
    """Run this environment's Python with nothing of the surrounding environment but ``variables``."""
    environ = {"PATH": os.defpath, "HOME": str(self.folder)} | {name: str(value) for name, value in variables.items()}
    command = [str(self.python), *map(str, arguments)]
    return subprocess.run(command, env=environ, cwd=self.folder, capture_output=True, text=True, timeout=120)

  def ask(self, code: str, *options: str, **variables: str | Path) -> Any:
    """Run code that sets ``answer``, and return that. Anything on standard error fails the test."""
    done = self.run(*options, "-c", printing(code), **variables)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


def printing(code: str) -> str:
  """The code, which then prints its ``answer`` as JSON."""
  return textwrap.dedent(code).strip() + "\nimport json; print(json.dumps(answer))"


def put_package(folder: Path) -> None:
  """Put the start-up modules and stand-ins for the plugin and the command line into a folder."""
  package = folder / "maxtext_ling2"
  package.mkdir(parents=True)
  for name in (*START_UP, "errors.py"):  # which `run` asks about a module that is missing
    shutil.copy(ROOT / "maxtext_ling2" / name, package)
  (package / "plugin.py").write_text(textwrap.dedent(REGISTER.format(name="ling2")))
  (package / "cli.py").write_text("import sys\n\n\ndef main():\n  print('command line', sys.argv[1:])\n")
