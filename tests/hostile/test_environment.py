"""The start-up where Python or its surroundings are not as usual; tests/test_startup.py has the usual ones, and plugins
that fail.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sandbox import Environment, printing, put_package

pytestmark = pytest.mark.hostile

REGISTERED = "import maxtext; answer = maxtext.registered"
BY_IMPORT = "import maxtext_ling2, maxtext; answer = [maxtext_ling2.startup.found_by, maxtext.registered]"


@pytest.fixture
def installed(tmp_path: Path) -> Environment:
  return Environment(tmp_path / "venv").install()


def files(folder: Path) -> set[Path]:
  return set(folder.rglob("*"))


# Options and variables of the interpreter


@pytest.mark.parametrize("options", [["-B"], ["-O"], ["-OO"], ["-P"], ["-X", "dev"], ["-X", "utf8=0"], ["-bb"], ["-q"]])
def test_options(installed: Environment, options: list[str]) -> None:
  assert installed.ask(REGISTERED, *options) == ["ling2"]


@pytest.mark.parametrize("options", [["-W", "error"], ["-W", "error", "-X", "dev"]])
def test_warnings_as_errors(installed: Environment, options: list[str]) -> None:
  """Nothing of ours warns where nothing is wrong."""
  assert installed.ask(REGISTERED, *options) == ["ling2"]


@pytest.mark.parametrize(
  "variables",
  [
    {"LC_ALL": "C"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "nonsense"},
    {"PYTHONIOENCODING": "ascii:strict"},
    {"PYTHONWARNINGS": "error"},
    {"PYTHONOPTIMIZE": "2"},
    {"PYTHONDONTWRITEBYTECODE": "1"},
    {"PYTHONHASHSEED": "0"},
    {"HOME": "/nonexistent"},
    {"HOME": ""},
    {"HOME": "/dev/null"},
    {"PATH": ""},
    {"TMPDIR": "/nonexistent"},
    {"PYTHONPATH": "/nonexistent:/dev/null::"},
    {"PYTHONSAFEPATH": "1"},
    {"PYTHONNOUSERSITE": "1"},
  ],
  ids=str,
)
def test_variables(installed: Environment, variables: dict[str, str]) -> None:
  assert installed.ask(REGISTERED, **variables) == ["ling2"]


def test_no_variables_at_all(installed: Environment) -> None:
  done = subprocess.run([installed.python, "-c", printing(REGISTERED)], env={}, capture_output=True, text=True)
  assert (done.returncode, done.stdout, done.stderr) == (0, '["ling2"]\n', "")


# Files


def test_a_site_where_byte_code_cannot_be_kept(installed: Environment) -> None:
  """A file stands where its folders would."""
  for package in ("maxtext", "maxtext_ling2"):
    shutil.rmtree(installed.site / package / "__pycache__", ignore_errors=True)
    (installed.site / package / "__pycache__").write_text("")
  before = files(installed.site)
  assert installed.ask(REGISTERED) == ["ling2"]
  assert files(installed.site) == before


def bound_by_permissions() -> None:
  """Takes from a process that becomes another program the right by which root writes anywhere.

  It stays root, as another user may not even reach its interpreter. Who is not root has no such right to lose.
  """
  PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
  ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def test_a_site_without_permission_to_write(installed: Environment) -> None:
  folders = [installed.site, *(path for path in installed.site.rglob("*") if path.is_dir())]
  before = files(installed.site)
  for folder in folders:
    folder.chmod(0o555)
  code = f"""
    import maxtext
    answer = maxtext.registered
    for folder in {list(map(str, folders))}:
      try:
        open(folder + "/written", "w")
      except PermissionError:
        continue
      answer.append(folder)
  """
  command = [installed.python, "-c", printing(code)]
  try:
    done = subprocess.run(command, env={}, capture_output=True, text=True, preexec_fn=bound_by_permissions)
  finally:
    for folder in folders:
      folder.chmod(0o755)
  assert (done.returncode, done.stdout, done.stderr) == (0, '["ling2"]\n', "")
  assert files(installed.site) == before


@pytest.mark.parametrize("name", ["with blanks in it", "Übung-日本語", "quo'te", "per%cent;semi", "emoji 🚀"])
def test_odd_paths(tmp_path: Path, name: str) -> None:
  environment = Environment(tmp_path / name).install()
  assert environment.ask(REGISTERED, LC_ALL="C.UTF-8") == ["ling2"]
  assert environment.ask(REGISTERED, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0") == ["ling2"]


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_a_package_on_pythonpath(tmp_path: Path, kind: str) -> None:
  environment = Environment(tmp_path / "venv")
  put_package(tmp_path / "source")
  source = tmp_path / "source"
  if kind == "zip":
    source = tmp_path / "source.zip"
    with zipfile.ZipFile(source, "w") as archive:
      for file in (tmp_path / "source").rglob("*.py"):
        archive.write(file, file.relative_to(tmp_path / "source"))
    shutil.rmtree(tmp_path / "source")
  assert environment.ask(BY_IMPORT, PYTHONPATH=source) == ["import", ["ling2"]]
  assert environment.ask(BY_IMPORT, "-S", PYTHONPATH=f"{source}:{environment.site}") == ["import", ["ling2"]]


def test_maxtext_in_a_zip(installed: Environment) -> None:
  with zipfile.ZipFile(installed.folder / "maxtext.zip", "w") as archive:
    archive.write(installed.site / "maxtext" / "__init__.py", "maxtext/__init__.py")
  shutil.rmtree(installed.site / "maxtext")
  assert installed.ask(REGISTERED, PYTHONPATH=installed.folder / "maxtext.zip") == ["ling2"]


def test_a_file_of_our_name_in_the_working_folder(installed: Environment) -> None:
  """At start only the site is searched; the -c that puts the working folder first comes later."""
  (installed.folder / "maxtext_ling2.py").write_text("raise SystemExit('the wrong file')")
  assert installed.ask(REGISTERED) == ["ling2"]


def test_a_file_called_maxtext_in_the_working_folder(installed: Environment) -> None:
  """Python imports that one, as ever; it gets the plugins, because it is what calls itself MaxText here."""
  (installed.folder / "maxtext.py").write_text("registered = ['mine']")
  assert installed.ask(REGISTERED) == ["mine", "ling2"]
  assert installed.ask(REGISTERED, "-P") == ["ling2"]


def test_a_folder_called_maxtext_in_the_working_folder(installed: Environment) -> None:
  """A checkout of MaxText, say: a folder without __init__.py hides nothing."""
  (installed.folder / "maxtext" / "configs").mkdir(parents=True)
  assert installed.ask(REGISTERED) == ["ling2"]


@pytest.mark.parametrize(
  "line", ["import what_is_not_there", "import sys; raise OSError('broken')", "import sys; sys.path.insert(0, 7)"]
)
@pytest.mark.parametrize("name", ["aaa.pth", "zzz.pth"])
def test_a_broken_pth_file_beside_ours(installed: Environment, name: str, line: str) -> None:
  """Python reports it and leaves the rest of that file out; ours is another one."""
  (installed.site / name).write_text(f"{line}\n")
  done = installed.run("-c", printing(REGISTERED))
  assert (done.returncode, done.stdout) == (0, '["ling2"]\n')
  assert "maxtext_ling2" not in done.stderr


def test_our_package_damaged(installed: Environment) -> None:
  """A start-up module that does not even compile: Python starts all the same."""
  installed.write("maxtext_ling2/startup.py", "def install(:")
  done = installed.run("-c", printing(REGISTERED))
  assert (done.returncode, done.stdout) == (0, "[]\n")


def test_our_package_without_discovery(installed: Environment) -> None:
  """Nothing could say whether LING2 is there, so MaxText cannot be imported."""
  (installed.site / "maxtext_ling2" / "discovery.py").unlink()
  done = installed.run("-c", "import maxtext")
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'maxtext_ling2.discovery'"


def test_our_package_without_the_plugin(installed: Environment) -> None:
  """One warning, and MaxText as it is without us: it knows no model of the name (test_real_maxtext.py)."""
  (installed.site / "maxtext_ling2" / "plugin.py").unlink()
  done = installed.run("-c", printing(REGISTERED))
  assert (done.returncode, done.stdout) == (0, "[]\n")
  assert done.stderr.count("Warning: ") == 1
  assert (
    f"PluginWarning: The MaxText plugin 'ling2' (maxtext_ling2.plugin:register, from maxtext-ling2 1.0 in "
    f"{installed.site}) is not active, because loading it failed with ModuleNotFoundError: No module named "
    "'maxtext_ling2.plugin'. MaxText goes on without it."
  ) in done.stderr


def test_byte_code_of_another_version(installed: Environment) -> None:
  installed.ask(REGISTERED)
  for file in (installed.site / "maxtext_ling2" / "__pycache__").iterdir():
    file.write_bytes(b"damaged")
  assert installed.ask(REGISTERED) == ["ling2"]


# Streams, threads, limits


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)], ids=str)
def test_closed_streams(installed: Environment, closed: tuple[int, ...]) -> None:
  answer = installed.folder / "answer"
  code = f"import maxtext; open({str(answer)!r}, 'w').write(str(maxtext.registered))"
  redirections = " ".join(f"{number}>&-" for number in closed)
  subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {redirections}', installed.python, code], env={}, check=True)
  assert answer.read_text() == "['ling2']"


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)], ids=str)
def test_a_warning_into_a_closed_stream(installed: Environment, closed: tuple[int, ...]) -> None:
  """A broken plugin is complained about, where that is possible, and harms nobody where it is not."""
  installed.add_distribution("maxtext-broken", "3.2.1", "broken = broken_plugin:register")
  test_closed_streams(installed, closed)


def test_streams_set_to_none(installed: Environment) -> None:
  """As under pythonw, or in a service."""
  installed.add_distribution("maxtext-broken", "3.2.1", "broken = broken_plugin:register")
  answer = installed.folder / "answer"
  code = f"""
import sys
sys.stdout = sys.stderr = None
import maxtext
open({str(answer)!r}, "w").write(str(maxtext.registered))
"""
  assert installed.run("-c", code).returncode == 0
  assert answer.read_text() == "['ling2']"


def test_a_low_limit_of_recursion(installed: Environment) -> None:
  """Twice what Python's own importlib.metadata needs to be imported."""
  assert installed.ask("import sys; sys.setrecursionlimit(120)\n" + REGISTERED + "\nsys.setrecursionlimit(1000)") == [
    "ling2"
  ]


def test_an_import_in_a_thread_while_the_main_thread_waits(installed: Environment) -> None:
  answer = installed.ask("""
    import threading
    found = []
    def work():
      import maxtext.sub
      found.extend(maxtext.sub.seen)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    answer = found
  """)
  assert answer == ["ling2"]


def test_an_import_at_exit(installed: Environment) -> None:
  done = installed.run("-c", "import atexit; atexit.register(lambda: print(__import__('maxtext').registered))")
  assert (done.stdout, done.stderr) == ("['ling2']\n", "")


def test_a_second_import_of_maxtext_in_a_process(installed: Environment) -> None:
  """As test frameworks do it: plugins are loaded once a process all the same."""
  answer = installed.ask("""
    import sys
    import maxtext
    first = list(maxtext.registered)
    del sys.modules["maxtext"]
    import maxtext
    answer = [first, maxtext.registered]
  """)
  assert answer == [["ling2"], []]


@pytest.mark.parametrize("start", ["spawn", "fork", "forkserver"])
def test_pools_of_workers(installed: Environment, start: str) -> None:
  script = installed.write(
    "pool.py",
    f"""
    import multiprocessing
    def work(number):
      import maxtext
      return maxtext.registered
    if __name__ == "__main__":
      with multiprocessing.get_context({start!r}).Pool(2) as pool:
        print(pool.map(work, range(3)))
    """,
  )
  done = installed.run(script)
  assert (done.stdout, done.stderr) == (f"{[['ling2']] * 3}\n", "")


# sys.path and sys.meta_path


@pytest.mark.parametrize(
  "entry", ["7", "None", "__import__('pathlib').Path('/nonexistent')", "b'/bytes'", "object()", "''"]
)
def test_entries_of_the_path_that_are_no_folders(installed: Environment, entry: str) -> None:
  assert installed.ask(f"import sys; sys.path.insert(0, {entry})\n" + REGISTERED) == ["ling2"]


def test_a_finder_that_raises_is_named_by_python(installed: Environment) -> None:
  """As without us: the error of the other finder goes through, and the next import works when it has gone."""
  answer = installed.ask("""
    import sys
    class Broken:
      def find_spec(self, name, path=None, target=None):
        raise RuntimeError("broken finder")
    broken = Broken()
    sys.meta_path.insert(1, broken)
    try:
      import maxtext
      answer = ["no error"]
    except RuntimeError as error:
      answer = [str(error)]
    sys.meta_path.remove(broken)
    import maxtext
    answer.append(maxtext.registered)
  """)
  assert answer == ["broken finder", ["ling2"]]


@pytest.mark.parametrize(
  "finder",
  [
    "object()",
    "type('Old', (), {'find_module': lambda *a: None})()",
    "type('C', (), {'find_spec': staticmethod(lambda *a: None)})",
  ],
)
def test_odd_finders(installed: Environment, finder: str) -> None:
  code = f"import sys; sys.meta_path.insert(1, {finder})\n" + REGISTERED
  assert installed.ask(code, "-W", "ignore") == ["ling2"]


def test_a_loader_without_exec_module(installed: Environment) -> None:
  """The plugins cannot be loaded behind such a loader, but the import is not ours to break."""
  answer = installed.ask("""
    import sys, types, importlib.machinery
    class Loader:
      def load_module(self, name):
        module = sys.modules[name] = types.ModuleType(name)
        module.registered = ["old loader"]
        return module
    class Finder:
      def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, Loader()) if name == "maxtext" else None
    sys.meta_path.insert(1, Finder())
    import warnings; warnings.simplefilter("ignore")
    import maxtext
    answer = maxtext.registered
  """)
  assert answer == ["old loader"]


# Taken away


def test_two_versions_the_newer_first(installed: Environment, tmp_path: Path) -> None:
  """A checkout on PYTHONPATH before an installed version: the first counts, and registers once."""
  put_package(tmp_path / "source")
  (tmp_path / "source" / "maxtext_ling2" / "plugin.py").write_text(
    "def register():\n  import maxtext\n  maxtext.registered.append('checkout')\n"
  )
  assert installed.ask(REGISTERED, PYTHONPATH=tmp_path / "source") == ["checkout"]


def test_uninstalled_python_works_and_maxtext_is_stock(installed: Environment) -> None:
  for path in installed.site.glob("maxtext_ling2*"):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  assert installed.ask("import sys, maxtext; answer = [maxtext.registered, len(sys.meta_path)]") == [[], 3]


def test_uninstalled_while_a_process_runs(installed: Environment) -> None:
  """What was there at the start has gone before MaxText is imported: a failure that says what is missing."""
  code = f"import shutil; shutil.rmtree({str(installed.site / 'maxtext_ling2')!r})\nimport maxtext"
  done = installed.run("-c", code)
  assert done.returncode != 0 and "maxtext_ling2" in done.stderr.splitlines()[-1]


def test_this_interpreter_is_the_one_under_test(installed: Environment) -> None:
  assert installed.ask("import sys; answer = list(sys.version_info[:2])") == list(sys.version_info[:2])
  assert os.access(installed.python, os.X_OK)
