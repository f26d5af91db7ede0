"""What is printed is what was said: brackets, colons and all, wherever a command prints."""

import ast
import io
import re
from pathlib import Path

import pytest
from rich.table import Table

import maxtext_ling2
from maxtext_ling2 import doctor, terminal
from maxtext_ling2.checkpoint import progress
from maxtext_ling2.plan import report
from maxtext_ling2.plan.estimate import Estimate

pytestmark = pytest.mark.unit

ODD = "a [tpu] b [/x] c [red]d[/] :smile: [bold"
SOURCES = sorted(Path(maxtext_ling2.__file__).parent.rglob("*.py"))


def plain(text):
  return re.sub(r"\x1b\[[\d;]*m", "", text)


def calls(path, name):
  """The calls of a function or class of this name in a source."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Call):
      called = node.func
      if (called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)) == name:
        yield node


@pytest.mark.parametrize("name", ["Console", "TextColumn"])
def test_what_would_read_markup_is_made_in_one_place(name):
  assert {path.name for path in SOURCES if any(calls(path, name))} == {"terminal.py"}


def test_no_text_is_markup():
  for path in SOURCES:
    text = path.read_text(encoding="utf-8")
    assert "rich.markup" not in text and "markup=True" not in text and "from_markup" not in text, path
    assert not re.search(r"\[(bold|red|green|yellow)\]|\[/\]", text), path


@pytest.mark.parametrize("colours", [False, True])
def test_text_stays_as_it_is(colours):
  file = io.StringIO()
  console = terminal.console(file=file, force_terminal=colours)
  console.print(ODD)
  console.print(ODD, style="red")
  console.print(terminal.labelled("fault", "red", ODD))
  assert plain(file.getvalue()).splitlines() == [ODD, ODD, f"fault {ODD}"]
  assert ("\x1b[31m" in file.getvalue()) == colours


def test_a_table_keeps_its_text():
  file = io.StringIO()
  table = Table(ODD, title=ODD)
  table.add_row(ODD)
  terminal.console(file=file, width=160).print(table)
  assert file.getvalue().count(ODD) == 3


def test_errors(capsys):
  terminal.print_error(f"{ODD} {'word ' * 60}".strip())
  assert capsys.readouterr() == ("", f"error: {ODD} {'word ' * 60}".strip() + "\n")


def test_doctor_prints_texts_as_they_are(capsys):
  found = doctor.Diagnosis({"maxtext": None}, {"found_by": "pth"}, {"XLA_FLAGS": ODD})
  found.faults.append(doctor.Issue(f"what {ODD}", f"remedy {ODD}"))
  for line in doctor.lines(found):
    terminal.console().print(line)
  assert capsys.readouterr().out.count(ODD) == 3


def test_progress(capsys):
  with progress.bar(progress.console(), ODD, 4, 1) as advance:
    advance(4, 1)
  assert ODD[:20] in capsys.readouterr().err


def test_a_refusal_of_plan_keeps_its_text():
  one = Estimate("v6e-8", "", 8, False, 1.0, 1.0, problem=ODD)
  file = io.StringIO()
  terminal.console(file=file).print(report.line(one))
  assert ODD in file.getvalue()
