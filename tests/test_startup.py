"""The start-up in real interpreters: when plugins are loaded, when not, and what may go wrong with them."""

import pkgutil
import shutil
from pathlib import Path

import pytest

from maxtext_ling2 import discovery
from maxtext_ling2.errors import INSTALL
from sandbox import OWN, SITE_FILES, Environment, printing, put_package

pytestmark = pytest.mark.hostile

REGISTERED = "import maxtext; answer = maxtext.registered"
RECORDS = """
import maxtext
from maxtext_ling2 import discovery
from maxtext_ling2.errors import INSTALL
answer = [[record.name, record.version, record.state] for record in discovery.plugins]
"""


@pytest.fixture
def bare(tmp_path: Path) -> Environment:
  """An environment without this package."""
  return Environment(tmp_path / "venv")


@pytest.fixture
def installed(bare: Environment) -> Environment:
  """An environment as an installer leaves it."""
  return bare.install()


@pytest.fixture
def source(bare: Environment, tmp_path: Path) -> Path:
  """A folder with the package for PYTHONPATH, without metadata; the environment knows nothing of it."""
  put_package(tmp_path / "source")
  return tmp_path / "source"


# Interpreter start


def test_start_imports_two_small_modules_and_nothing_else(installed: Environment) -> None:
  modules = "import sys; answer = sorted(sys.modules)"
  with_plugin = installed.ask(modules)
  installed.write("maxtext_ling2.pth", "# Python 3.13 needs a codec to read any such file")
  without = installed.ask(modules)
  assert set(with_plugin) - set(without) == {"maxtext_ling2", "maxtext_ling2.startup"}
  assert not {"jax", "maxtext", "pydantic", "numpy", "importlib.metadata"} & set(with_plugin)


def test_a_package_that_has_gone_leaves_no_trace_in_the_output(installed: Environment) -> None:
  shutil.rmtree(installed.site / "maxtext_ling2")
  assert installed.ask(REGISTERED) == []
  (installed.site / "maxtext_ling2" / "__pycache__").mkdir(parents=True)  # as an uninstaller may leave it
  assert installed.ask(REGISTERED) == []


def test_start_file_does_what_the_pth_file_does(installed: Environment) -> None:
  """Python 3.15 resolves and calls each line like this (PEP 829)."""
  (installed.site / "maxtext_ling2.pth").unlink()
  lines = (SITE_FILES / "maxtext_ling2.start").read_text().splitlines()
  targets = [line for line in lines if line and not line.startswith("#")]
  assert all(callable(pkgutil.resolve_name(target)) for target in targets)
  answer = installed.ask(f"""
    import pkgutil
    for target in {targets}:
      pkgutil.resolve_name(target)()
    import maxtext
    from maxtext_ling2 import startup
    answer = [startup.found_by, maxtext.registered]
  """)
  assert answer == ["start", ["ling2"]]


# When plugins are loaded


@pytest.mark.parametrize(
  "statement",
  [
    "import maxtext",
    "import maxtext.sub",
    "from maxtext import sub",
    "import importlib; importlib.import_module('maxtext.sub')",
  ],
)
def test_any_import_of_maxtext_loads_the_plugins(installed: Environment, statement: str) -> None:
  assert installed.ask(f"{statement}\nimport maxtext; answer = maxtext.registered") == ["ling2"]


def test_plugins_are_loaded_before_any_module_of_maxtext(installed: Environment) -> None:
  assert installed.ask("import maxtext.sub; answer = maxtext.sub.seen") == ["ling2"]


def test_a_module_of_maxtext_run_as_main_has_the_plugins(installed: Environment) -> None:
  installed.write("maxtext/train.py", "import maxtext\nprint(__name__, maxtext.registered)")
  done = installed.run("-m", "maxtext.train")
  assert (done.stdout, done.stderr) == ("__main__ ['ling2']\n", "")


def test_other_modules_do_not_load_the_plugins(installed: Environment) -> None:
  installed.write("maxtext_other.py", "")
  assert installed.ask("import maxtext_other, json, sys; answer = 'maxtext_ling2.plugin' in sys.modules") is False


def test_maxtext_looks_as_without_us(installed: Environment) -> None:
  answer = installed.ask("""
    import maxtext, sys
    from maxtext_ling2 import startup
    from importlib.machinery import SourceFileLoader
    loaders = maxtext.__loader__, maxtext.__spec__.loader
    answer = [type(loader) is SourceFileLoader for loader in loaders] + [startup._finder in sys.meta_path]
  """)
  assert answer == [True, True, False]


def test_asking_whether_maxtext_is_there_does_not_use_the_finder_up(installed: Environment) -> None:
  assert installed.ask("import importlib.util; importlib.util.find_spec('maxtext')\n" + REGISTERED) == ["ling2"]


def test_an_import_of_maxtext_that_failed_can_be_tried_again(installed: Environment) -> None:
  installed.write("maxtext/__init__.py", "import sys\nregistered = []\nif not hasattr(sys, 'second'): raise OSError")
  answer = installed.ask("""
    import sys
    try:
      import maxtext
    except OSError:
      sys.second = True
    import maxtext
    answer = maxtext.registered
  """)
  assert answer == ["ling2"]


def test_without_maxtext_its_import_fails_as_ever(installed: Environment) -> None:
  shutil.rmtree(installed.site / "maxtext")
  done = installed.run("-c", "import maxtext")
  assert done.stderr.endswith("ModuleNotFoundError: No module named 'maxtext'\n")


def test_a_finder_of_someone_else_that_asks_all_finders_does_not_recur_forever(installed: Environment) -> None:
  answer = installed.ask("""
    import sys
    class Other:
      def find_spec(self, name, path=None, target=None):
        return next(filter(None, (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)), None)
    sys.meta_path.insert(0, Other())
    import maxtext
    answer = maxtext.registered
  """)
  assert answer == ["ling2"]


def test_installing_again_changes_nothing(installed: Environment) -> None:
  answer = installed.ask("""
    import sys
    from maxtext_ling2 import startup
    startup.install("import")
    finders = sys.meta_path.count(startup._finder)
    import maxtext
    startup.install("import")
    from maxtext_ling2 import discovery
    answer = [finders, startup.found_by, maxtext.registered, len(discovery.plugins), startup._finder in sys.meta_path]
  """)
  assert answer == [1, "pth", ["ling2"], 1, False]


def test_threads_that_import_maxtext_together_all_find_the_plugins(installed: Environment) -> None:
  installed.write("maxtext/__init__.py", "import time\ntime.sleep(0.2)\nregistered = []")
  answer = installed.ask("""
    from concurrent.futures import ThreadPoolExecutor
    def work(_):
      import maxtext
      return list(maxtext.registered)
    with ThreadPoolExecutor(4) as pool:
      answer = list(pool.map(work, range(4)))
  """)
  assert answer == [["ling2"]] * 4


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_workers_have_the_plugins(installed: Environment, method: str) -> None:
  script = installed.write(
    "work.py",
    f"""
    import multiprocessing, time
    def work(queue):
      import maxtext
      queue.put(maxtext.registered)
    if __name__ == "__main__":
      context = multiprocessing.get_context({method!r})
      queue = context.Queue()
      worker = context.Process(target=work, args=(queue,))
      worker.start()
      print(queue.get(timeout=60))
      worker.join()
    """,
  )
  done = installed.run(script)
  assert (done.stdout, done.stderr) == ("['ling2']\n", "")


# Where Python does not process .pth files


@pytest.mark.parametrize("option", ["-I", "-E", "-s"])
def test_isolated_interpreters_have_the_plugins(installed: Environment, option: str) -> None:
  assert installed.ask(REGISTERED, option) == ["ling2"]


def test_without_site_importing_the_package_is_enough(installed: Environment) -> None:
  code = "import maxtext_ling2, maxtext; answer = [maxtext_ling2.startup.found_by, maxtext.registered]"
  assert installed.ask(code, "-S", PYTHONPATH=installed.site) == ["import", ["ling2"]]
  assert installed.ask(REGISTERED, "-S", PYTHONPATH=installed.site) == []


def test_a_source_folder_on_pythonpath_needs_no_metadata(bare: Environment, source: Path) -> None:
  code = "import maxtext_ling2, maxtext; answer = [maxtext_ling2.startup.found_by, maxtext.registered]"
  assert bare.ask(code, PYTHONPATH=source) == ["import", ["ling2"]]


def test_importing_the_package_after_maxtext_loads_the_plugins_at_once(bare: Environment, source: Path) -> None:
  code = "import maxtext, maxtext_ling2; answer = [maxtext.registered, maxtext_ling2.__version__]"
  answer = bare.ask(code, PYTHONPATH=source)
  assert answer[0] == ["ling2"] and answer[1]


def test_run_is_python_m_with_the_plugins(bare: Environment, source: Path) -> None:
  bare.write("maxtext/train.py", "import sys, maxtext\nprint(__name__, sys.argv, maxtext.registered)\nsys.exit(7)")
  done = bare.run("-m", "maxtext_ling2", "run", "maxtext.train", "a.yml", "--run", "-S", PYTHONPATH=source)
  arguments = [str(bare.site / "maxtext" / "train.py"), "a.yml", "--run", "-S"]
  assert (done.returncode, done.stdout, done.stderr) == (7, f"__main__ {arguments} ['ling2']\n", "")


def test_run_imports_nothing_that_the_module_does_not_import(bare: Environment, source: Path) -> None:
  bare.write("show.py", "import sys\nprint('maxtext_ling2.cli' in sys.modules, 'importlib.metadata' in sys.modules)")
  assert bare.run("-m", "maxtext_ling2", "run", "show", PYTHONPATH=source).stdout == "False False\n"


@pytest.mark.parametrize("module", ["absent", "maxtext.absent", "absent.module"])
def test_run_says_that_there_is_no_such_module(bare: Environment, source: Path, module: str) -> None:
  done = bare.run("-m", "maxtext_ling2", "run", module, PYTHONPATH=source)
  assert done.returncode == 1 and f"no module {module!r}" in done.stderr and "Traceback" not in done.stderr


def test_run_shows_what_a_parent_package_failed_to_import(bare: Environment, source: Path) -> None:
  bare.write("maxtext/__init__.py", "import what_maxtext_needs")
  bare.write("jax.py", "")
  done = bare.run("-m", "maxtext_ling2", "run", "maxtext.sub", PYTHONPATH=source)
  assert done.stderr.endswith("ModuleNotFoundError: No module named 'what_maxtext_needs'\n")


def test_run_says_what_to_install_where_maxtext_came_without_an_extra(bare: Environment, source: Path) -> None:
  bare.write("maxtext/__init__.py", "import what_maxtext_needs")
  done = bare.run("-m", "maxtext_ling2", "run", "maxtext.sub", PYTHONPATH=source)
  assert done.stderr == f"error: No module named 'what_maxtext_needs', which MaxText needs; run: {INSTALL}\n"


def test_run_without_a_module_shows_its_usage(bare: Environment, source: Path) -> None:
  assert bare.run("-m", "maxtext_ling2", "run", PYTHONPATH=source).returncode == 2
  done = bare.run("-m", "maxtext_ling2", "run", "--help", PYTHONPATH=source)
  assert done.returncode == 0 and done.stdout.startswith("usage: python -m maxtext_ling2 run MODULE")


def test_other_subcommands_go_to_the_command_line(installed: Environment) -> None:
  assert installed.run("-m", "maxtext_ling2", "doctor", "--json").stdout == "command line ['doctor', '--json']\n"


# Switches


@pytest.mark.parametrize("value", ["1", "yes", "false"])
def test_disabled_nothing_of_ours_is_loaded(installed: Environment, value: str) -> None:
  installed.add_plugin("other")
  code = "import sys, maxtext; answer = [maxtext.registered, [n for n in sys.modules if n.startswith('maxtext_ling2')]]"
  assert installed.ask(code, MAXTEXT_LING2_DISABLE=value) == [[], []]


@pytest.mark.parametrize("value", ["", "0"])
def test_these_values_do_not_disable(installed: Environment, value: str) -> None:
  assert installed.ask(REGISTERED, MAXTEXT_LING2_DISABLE=value) == ["ling2"]


def test_disabled_the_package_can_be_imported_and_does_nothing(installed: Environment) -> None:
  code = """
    import sys, maxtext_ling2, maxtext
    answer = [maxtext_ling2.startup.found_by, maxtext.registered, maxtext_ling2.startup._finder in sys.meta_path]
  """
  assert installed.ask(code, MAXTEXT_LING2_DISABLE="1") == [None, [], False]


def test_a_program_can_disable_before_it_imports_maxtext(installed: Environment) -> None:
  assert installed.ask("import os; os.environ['MAXTEXT_LING2_DISABLE'] = '1'\n" + REGISTERED) == []


@pytest.mark.parametrize(
  ("allowed", "registered"),
  [("ling2", ["ling2"]), ("other", ["other"]), (" ling2 , other,", ["ling2", "other"]), ("", []), (",", [])],
)
def test_allow_list(installed: Environment, allowed: str, registered: list[str]) -> None:
  installed.add_plugin("other")
  assert installed.ask(REGISTERED) == ["ling2", "other"]
  assert installed.ask(REGISTERED, MAXTEXT_PLUGINS=allowed) == registered


def test_what_the_allow_list_leaves_out_is_on_record(installed: Environment) -> None:
  installed.add_plugin("other")
  assert installed.ask(RECORDS, MAXTEXT_PLUGINS="other") == [["ling2", "1.0", "skipped"], ["other", "1.0", "loaded"]]


def test_unknown_names_in_the_allow_list_are_named(installed: Environment) -> None:
  done = installed.run("-c", printing(REGISTERED), MAXTEXT_PLUGINS="ling2,lingg")
  assert done.stdout == '["ling2"]\n'
  assert done.stderr.count("Warning") == 1 and "names 'lingg', but" in done.stderr and "known: 'ling2'." in done.stderr


# Plugins that fail


@pytest.mark.parametrize(
  ("text", "error"),
  [
    (None, "ModuleNotFoundError: No module named 'broken_plugin'"),
    ("import what_is_not_there", "ModuleNotFoundError: No module named 'what_is_not_there'"),
    ("raise ValueError('at import')", "ValueError: at import"),
    ("def register(): raise LookupError('when called')", "LookupError: when called"),
    ("raise SystemExit(3)", "SystemExit: 3"),
    ("def register(): raise SystemExit('no licence')", "SystemExit: no licence"),
    ("register = None", "TypeError: 'NoneType' object is not callable"),
    ("def register(needed): pass", "TypeError: register() missing 1 required positional argument: 'needed'"),
    ("def register(:", "SyntaxError: invalid syntax (broken_plugin.py, line 1)"),
  ],
)
def test_a_broken_plugin_is_named_and_harms_nobody(installed: Environment, text: str | None, error: str) -> None:
  installed.add_distribution("maxtext-broken", "3.2.1", "broken = broken_plugin:register")
  installed.add_plugin("other")
  if text is not None:
    installed.write("broken_plugin.py", text)
  done = installed.run("-c", printing(REGISTERED))
  assert (done.returncode, done.stdout) == (0, '["ling2", "other"]\n')
  assert done.stderr.count("Warning: ") == 1
  assert f"'broken' (broken_plugin:register, from maxtext-broken 3.2.1 in {installed.site})" in done.stderr
  assert error in done.stderr


def test_a_filter_that_makes_warnings_errors_stops_no_plugin(installed: Environment) -> None:
  """The import fails then, as its user asked for; but not before all plugins had their turn."""
  installed.add_distribution("maxtext-broken", "3.2.1", "broken = broken_plugin:register")
  answer = installed.ask(
    """
    try:
      import maxtext
    except RuntimeWarning as warning:
      answer = [str(warning)]
    from maxtext_ling2 import discovery
    answer += [[record.name, record.state] for record in discovery.plugins]
    """,
    "-W",
    "error::RuntimeWarning",
  )
  assert "'broken'" in answer[0] and answer[1:] == [["broken", "failed"], ["ling2", "loaded"]]


FATAL = """
  class Incomplete(Exception):
    fatal = True
  def register():
    raise Incomplete("cannot be had whole")
"""


def test_a_fatal_error_goes_through_and_does_so_again(installed: Environment) -> None:
  installed.write("maxtext_ling2/plugin.py", FATAL)
  installed.add_plugin("another")
  answer = installed.ask("""
    answer = []
    for attempt in range(2):
      try:
        import maxtext
      except Exception as error:
        answer.append(str(error))
    from maxtext_ling2 import discovery
    answer += [[record.name, record.state, record.reason] for record in discovery.plugins]
  """)
  loaded, failed = ["another", "loaded", None], ["ling2", "failed", "Incomplete: cannot be had whole"]
  assert answer[:2] == ["cannot be had whole"] * 2 and failed in answer and loaded in answer


def test_the_user_can_interrupt_a_plugin(installed: Environment) -> None:
  installed.write("maxtext_ling2/plugin.py", "def register(): raise KeyboardInterrupt")
  done = installed.run("-c", "import maxtext")
  assert done.returncode != 0 and done.stderr.endswith("KeyboardInterrupt\n")


# Metadata that is not as it should be


def test_what_two_dist_infos_offer_runs_once(installed: Environment) -> None:
  installed.add_distribution("maxtext-ling2", "0.9", OWN)
  assert installed.ask(REGISTERED) == ["ling2"]
  ((name, version, state),) = installed.ask(RECORDS)
  assert (name, state) == ("ling2", "loaded") and version in ("0.9", "1.0")


def test_a_stale_dist_info_that_offers_what_has_gone_is_named(installed: Environment) -> None:
  installed.add_distribution("maxtext-ling2", "0.9", "ling2 = maxtext_ling2.old:register")
  done = installed.run("-c", printing(REGISTERED))
  assert done.stdout == '["ling2"]\n' and "from maxtext-ling2 0.9" in done.stderr


def test_a_distribution_that_another_one_hides_has_no_say(installed: Environment, tmp_path: Path) -> None:
  """As a virtual environment hides an older version in the system's site-packages."""
  installed.add_distribution("maxtext-ling2", "0.9", "ling2 = maxtext_ling2.old:register", site=tmp_path / "system")
  code = f"import sys; sys.path.append({str(tmp_path / 'system')!r})\n"
  assert installed.ask(code + REGISTERED) == ["ling2"]
  assert installed.ask(code + RECORDS) == [["ling2", "1.0", "loaded"]]


def test_a_folder_that_stands_in_the_path_twice_counts_once(installed: Environment) -> None:
  code = f"import sys; sys.path.append({str(installed.site)!r})\n" + RECORDS
  assert installed.ask(code) == [["ling2", "1.0", "loaded"]]


def test_broken_metadata_of_another_distribution_is_named(installed: Environment) -> None:
  folder = installed.add_distribution("maxtext-half", "2.0", "half = half_plugin:register")
  (folder / "METADATA").unlink()
  done = installed.run("-c", printing(REGISTERED))
  assert done.stdout == '["ling2"]\n' and str(folder) in done.stderr


def test_a_finder_that_cannot_list_its_distributions_harms_nobody(installed: Environment) -> None:
  code = """
    import sys
    class Broken:
      def find_spec(self, *arguments): return None
      def find_distributions(self, context): raise OSError("no list")
    sys.meta_path.append(Broken())
    import maxtext
    answer = maxtext.registered
  """
  done = installed.run("-c", printing(code))
  assert done.stdout == '["ling2"]\n' and "no list" in done.stderr and "Traceback" not in done.stderr


def test_a_record_says_where_a_plugin_comes_from(installed: Environment) -> None:
  answer = installed.ask("""
    import dataclasses, maxtext
    from maxtext_ling2 import discovery
    answer = [dataclasses.asdict(record) for record in discovery.plugins]
  """)
  name, value = OWN.split(" = ")
  expected = {"name": name, "value": value, "distribution": "maxtext-ling2", "version": "1.0", "state": "loaded"}
  assert answer == [expected | {"location": str(installed.site), "reason": None}]
  assert set(answer[0]) == set(discovery.PluginRecord.__dataclass_fields__)
