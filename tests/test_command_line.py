"""The command line as a whole: help, version, completion, examples, errors, and what is imported for them."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import maxtext_ling2
from maxtext_ling2 import cli
from maxtext_ling2.cli.app import examples_of, first_sentence
from maxtext_ling2.errors import OptionError
from test_docs import script

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parent.parent
RUNNER = CliRunner()
GROUP = typer.main.get_command(cli.app)
COMMANDS = GROUP.commands


def run(*arguments, **variables):
  command = [sys.executable, "-m", "maxtext_ling2", *arguments]
  return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=60)


def test_the_page_is_what_the_command_line_says():
  assert (ROOT / "docs" / "commands.md").read_text() == script("commands_table").page()


@pytest.mark.parametrize("columns", ["60", "80"])
def test_help_cuts_nothing(columns):
  shown = run("--help", COLUMNS=columns, TERMINAL_WIDTH=columns).stdout
  joined = " ".join(shown.split())
  for name, command in COMMANDS.items():
    assert f"{name} {first_sentence(command.help)}" in joined, name
  assert max(map(len, shown.splitlines())) <= int(columns)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_ends_with_examples(name):
  short, long = (RUNNER.invoke(cli.app, [name, option], prog_name="maxtext-ling2").stdout for option in ("-h", "--help"))
  assert short == long
  examples = examples_of(COMMANDS[name])
  assert examples
  head, _, tail = long.partition("Example")
  assert [line.strip() for line in tail.splitlines()[1:] if line.strip()] == examples
  assert first_sentence(COMMANDS[name].help) in " ".join(head.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_understood(name):
  for example in examples_of(COMMANDS[name]):
    program, command, *arguments = shlex.split(example)
    assert (program, command) == ("maxtext-ling2", name)
    COMMANDS[name].make_context(name, arguments)  # raises for an option that does not exist


def test_version():
  assert run("--version").stdout == f"maxtext-ling2 {maxtext_ling2.__version__}\n"


def test_completion():
  asked = {"_MAXTEXT_LING2_COMPLETE": "complete_bash", "COMP_WORDS": "maxtext-ling2 pl", "COMP_CWORD": "1"}
  done = subprocess.run(
    [sys.executable, "-c", "from maxtext_ling2.cli import main; import sys; sys.argv[0] = 'maxtext-ling2'; main()"],
    env=os.environ | asked,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.stdout.split() == ["plan"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plan", "--help"], ["generate", "-h"], ["recipe"]])
def test_what_needs_no_model_imports_none(arguments):
  code = (
    "import json, sys; from maxtext_ling2 import cli\ntry: cli.main()\nfinally:\n"
    "  print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
  )
  done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
  assert done.returncode == 0 and done.stdout
  assert not {"jax", "numpy", "maxtext", "torch", "transformers", "yaml"} & set(json.loads(done.stderr))


def test_run_hands_on_all_that_follows_the_module(tmp_path):
  (tmp_path / "mine.py").write_text("import sys; print(sys.argv[1:])")
  command = [sys.executable, "-c", "from maxtext_ling2.cli import main; main()", "run", "mine", "--help", "-h", "--x=1"]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
  assert done.stdout == "['--help', '-h', '--x=1']\n"


@pytest.mark.parametrize(
  ("error", "code", "text"),
  [
    (ValueError("a [tpu] b"), 1, "error: a [tpu] b\n"),
    (FileNotFoundError(2, "No such file or directory", "x"), 1, "error: x: No such file or directory; name a path"),
    (OptionError("--a and --b"), 2, "--a and --b"),
    (KeyboardInterrupt(), 130, ""),
    (
      ModuleNotFoundError("No module named 'jax'", name="jax"),
      1,
      "error: No module named 'jax', which MaxText needs",
    ),
  ],
)
def test_errors_are_one_line_and_a_code(error, code, text):
  app = cli.App()

  def fails():
    """Fail."""
    raise error

  app.add(fails, "maxtext-ling2 fails")
  app.add(lambda: None, "maxtext-ling2 other", name="other")
  found = RUNNER.invoke(app, ["fails"])
  assert found.exit_code == code and found.stdout == "" and "Traceback" not in found.stderr
  assert text in " ".join(found.stderr.split(" "))


def test_errors_of_another_kind_keep_their_traceback():
  app = cli.App()

  def fails():
    """Fail."""
    raise ModuleNotFoundError("No module named 'maxtext_ling2.x'", name="maxtext_ling2.x")

  app.add(fails, "maxtext-ling2 fails")
  app.add(lambda: None, "maxtext-ling2 other", name="other")
  assert isinstance(RUNNER.invoke(app, ["fails"]).exception, ModuleNotFoundError)


def test_a_reader_that_leaves_is_no_error(tmp_path):
  """As `| head -1` does; what was not read is not an error that anyone needs to see."""
  command = f"{shlex.quote(sys.executable)} -m maxtext_ling2 recipe | true"
  done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
  assert (done.returncode, done.stderr) == (0, "")


TERMINALS = ({"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"NO_COLOR": "1"}, {"TERM": "dumb"})


@pytest.mark.parametrize("variables", TERMINALS, ids=str)
def test_any_terminal_will_do(variables, tmp_path):
  done = run("config", str(tmp_path / "nöwhere"), **variables)
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert re.match(r"error: .*n(ö|\\xf6|\\udcc3\\udcb6)where", done.stderr), done.stderr


def test_a_terminal_without_the_letters_gets_them_escaped():
  code = "from maxtext_ling2 import cli; cli.app = lambda: print('a \u00f6 \u4e2d'); cli.main()"
  environ = os.environ | {"PYTHONIOENCODING": "ascii"}
  done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60)
  assert (done.stdout, done.stderr) == ("a \\xf6 \\u4e2d\n", "")
