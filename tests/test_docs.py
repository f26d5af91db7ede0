"""The pages: marks of their shell blocks, links, navigation, options that they name, and what is made from code."""

import importlib.machinery
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml

from maxtext_ling2 import cli, plugin

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.md"))]
MADE = {"scale.md"}  # by benchmarks/scale.py; a checkout may lack it


def script(name):
  """A script without a suffix, as a module."""
  loader = importlib.machinery.SourceFileLoader(name, str(ROOT / "scripts" / name))
  module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
  sys.modules[name] = module
  loader.exec_module(module)
  return module


def test_marks_and_links():
  done = subprocess.run([sys.executable, ROOT / "scripts" / "docs_test", "--check"], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_every_need_is_some_blocks():
  docs_test = script("docs_test")
  assert docs_test.pages() == PAGES
  assert {need for page in PAGES for block in docs_test.blocks(page) for need in block.needs} == docs_test.NEEDS


def test_a_block_of_several_pages_runs_once(tmp_path, monkeypatch):
  docs_test, ran = script("docs_test"), []
  monkeypatch.setattr(docs_test, "ROOT", tmp_path)
  monkeypatch.setattr(docs_test, "run", lambda chain: ran.extend(block.place for block in chain) or True)
  for name in "ab":
    (tmp_path / f"{name}.md").write_text(f"<!-- run -->\n```sh\nls\n```\n<!-- run -->\n```sh\nls {name}\n```\n")
  monkeypatch.setattr(sys, "argv", ["docs_test", str(tmp_path / "a.md"), str(tmp_path / "b.md")])
  assert docs_test.main() == 0
  assert ran == ["a.md:2", "a.md:6", "b.md:6"]


@pytest.mark.parametrize(
  ("text", "problem"),
  [
    ("```sh\nls\n```", "without a mark"),
    ("<!-- needs: luck -->\n```sh\nls\n```", "luck"),
    ("<!-- run -->\n\n```sh\nls\n```", "without a mark"),
    ("<!-- run -->\n```sh\nls\n```", None),
    ("<!-- needs: TPU, data -->\n```sh\nls\n```", None),
  ],
)
def test_a_wrong_mark_is_found(tmp_path, text, problem):
  docs_test = script("docs_test")
  (tmp_path / "page.md").write_text(text + "\n")
  (block,) = docs_test.blocks(tmp_path / "page.md")
  assert block.text == "ls\n"
  assert block.problem() is None if problem is None else problem in block.problem()


def test_a_broken_link_is_found(tmp_path, monkeypatch):
  docs_test = script("docs_test")
  monkeypatch.setattr(docs_test, "ROOT", tmp_path)
  (tmp_path / "a.md").write_text("# One thing\n\n[here](#one-thing) [no](b.md) [nor](#two) [web](https://example.org)\n")
  found = docs_test.broken_links(tmp_path / "a.md")
  assert [text.split("link to ")[1].split(",")[0] for text in found] == ["b.md", "#two"]


def test_a_block_runs_strictly_in_a_folder_of_its_own():
  docs_test = script("docs_test")
  page = ROOT / "README.md"
  assert docs_test.run([docs_test.Block(page, 1, 'test -d examples && test "$JAX_PLATFORMS" = cpu\n', None)])
  for text in ("false | true\n", "echo $unset\n", "false\ntrue\n"):
    assert not docs_test.run([docs_test.Block(page, 1, text, None)])


def test_blocks_of_a_page_share_a_folder_and_stop_at_the_first_that_fails(tmp_path, monkeypatch):
  docs_test = script("docs_test")
  monkeypatch.setattr(docs_test, "ROOT", tmp_path)
  page = "<!-- run -->\n```sh\n{}\n```\n<!-- then -->\n```sh\n{}\n```\n"
  (tmp_path / "a.md").write_text(page.format("echo 1 > file", "test $(cat file) = 1; touch $OUT/first"))
  (tmp_path / "b.md").write_text(page.format("false", "touch $OUT/second"))
  (tmp_path / "c.md").write_text("<!-- run -->\n```sh\nfalse\n```\n")  # what b.md begins with
  monkeypatch.setenv("OUT", str(tmp_path))
  chains = docs_test.chains([block for name in "abc" for block in docs_test.blocks(tmp_path / f"{name}.md")])
  assert [[block.place for block in chain] for chain in chains] == [["a.md:2", "a.md:6"], ["b.md:2", "b.md:6"]]
  assert [docs_test.run(chain) for chain in chains] == [True, False]
  assert (tmp_path / "first").exists() and not (tmp_path / "second").exists()


def test_the_output_of_a_block_is_held_against_the_page(tmp_path, monkeypatch):
  docs_test = script("docs_test")
  monkeypatch.setattr(docs_test, "ROOT", tmp_path)
  text = "<!-- run -->\n```sh\nseq 3; echo loss 4.25\n```\nprints\n\n<!-- output -->\n```text\n{}\n```\n"
  for said, right in (("1\n3\nloss ...", True), ("3\n1", False), ("1\n\n2", True), ("loss", False), ("4", False)):
    (tmp_path / "page.md").write_text(text.format(said))
    (block,) = docs_test.blocks(tmp_path / "page.md")
    assert docs_test.run([block]) is right, said


def test_a_block_cannot_go_on_from_one_that_is_not_run(tmp_path, monkeypatch, capsys):
  docs_test = script("docs_test")
  monkeypatch.setattr(docs_test, "ROOT", tmp_path)
  (tmp_path / "page.md").write_text("<!-- needs: TPU -->\n```sh\nls\n```\n<!-- then -->\n```sh\nls\n```\n")
  monkeypatch.setattr(sys, "argv", ["docs_test", "--check", str(tmp_path / "page.md")])
  assert docs_test.main() == 1 and "page.md:6: <!-- then --> after a block" in capsys.readouterr().err


def named(nav):
  """The pages in a navigation."""
  for entry in nav:
    for value in entry.values() if isinstance(entry, dict) else [entry]:
      yield from named(value) if isinstance(value, list) else [value]


def test_the_navigation_lists_all_pages():
  config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
  listed = list(named(config["nav"]))
  assert len(listed) == len(set(listed))
  assert set(listed) == {page.name for page in (ROOT / "docs").glob("*.md")} | MADE
  assert config["strict"] and config["theme"]["font"] is False


def options():
  """{command: its options} of maxtext-ling2."""
  group = typer.main.get_command(cli.app)
  return {
    name: {"--help", *(word for parameter in command.params for word in (*parameter.opts, *parameter.secondary_opts))}
    for name, command in group.commands.items()
  }


def used():
  """(page, command, options) of each use of maxtext-ling2 in blocks and in the text."""
  for page in PAGES:
    text = page.read_text().replace("\\\n", " ")
    for match in re.finditer(r"(?:maxtext-ling2|-m maxtext_ling2) (?P<command>[a-z]+)(?P<rest>[^\n`|]*)", text):
      yield page.name, match["command"], re.findall(r"(?<![\w-])--?[a-z][a-z-]*", match["rest"].split("#")[0])


def test_options_in_the_pages_exist():
  known, seen = options(), 0
  for page, command, words in used():
    if command in ("run", "constraints"):  # handled before the command line, by __main__.py
      continue
    if not words and command not in known:  # "maxtext-ling2 was asked for", and the like
      continue
    seen += 1
    assert command in known, (page, command)
    assert set(words) <= known[command], (page, command, words)
  assert seen >= 15


def test_options_of_the_examples_exist():
  known = options()
  for path in (ROOT / "examples").glob("*.sh"):
    for match in re.finditer(r"-m maxtext_ling2 ([a-z]+)((?:[^\n]|(?<=\\)\n)*)", path.read_text()):
      assert set(re.findall(r"(?<=\s)--[a-z][a-z-]*", match[2])) <= known[match[1]], path


def test_every_example_has_a_cpu_mode_and_stops_at_errors():
  scripts = [path for path in (ROOT / "examples").glob("*.sh") if path.name != "common.sh"]
  assert len(scripts) >= 5
  for path in scripts:
    text = path.read_text()
    assert "set -euo pipefail" in text and f"CPU=1 examples/{path.name}" in text, path
    assert subprocess.run(["bash", "-n", path]).returncode == 0


def test_the_table_of_names_is_what_the_code_says():
  assert (ROOT / "docs" / "names.md").read_text() == script("names_table").page()


def test_the_table_of_config_keys_is_what_the_code_says():
  assert (ROOT / "docs" / "config_json.md").read_text() == script("config_table").page()


def test_the_notebook_runs_as_python_and_has_no_output():
  """scripts/run_notebook makes a script of it, which the page "First hour" runs; its commands have options that exist."""
  run_notebook, known = script("run_notebook"), options()
  notebook = json.loads((ROOT / "examples" / "first_hour.ipynb").read_text())
  text = run_notebook.script(notebook)
  compile(text, "first_hour.ipynb", "exec")
  assert [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"] == [[]] * 5
  commands = re.findall(r"^shell\('maxtext-ling2 ([a-z]+)(.*)'\)$", text, re.MULTILINE)
  assert [name for name, _ in commands] == ["doctor", "demo", "generate"]
  for name, words in commands:
    assert set(re.findall(r"(?<![\w-])--[a-z-]+", words)) <= known[name]
  for wrong in ({"nbformat": 3}, {"nbformat": 4, "cells": [{"cell_type": "code", "source": ["%time 1"]}]}):
    with pytest.raises(ValueError, match="nbformat=3|magic is not known"):
      run_notebook.script(wrong)


def test_a_shell_line_of_a_notebook_that_fails_ends_it(tmp_path):
  cells = [{"cell_type": "code", "source": ["x = 'a'\n", "!echo $((1 + 1)) > out; false | true\n", "open('after', 'w')"]}]
  (tmp_path / "a.ipynb").write_text(json.dumps({"nbformat": 4, "cells": cells}))
  command = [sys.executable, ROOT / "scripts" / "run_notebook", "a.ipynb"]
  assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode != 0
  assert (tmp_path / "out").read_text() == "2\n" and not (tmp_path / "after").exists()


def test_the_site_checks_all_links_and_shows_the_version():
  config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
  assert {value for kind in config["validation"].values() for value in kind.values()} == {"warn"}  # with strict, an error
  hooks = script("site_hooks.py")
  settings = type("Config", (), {"site_name": "name", "copyright": None})()
  assert hooks.on_config(settings).site_name == f"name {hooks.__version__}"
  cell = "<td><code>a_b/c.py</code> a_b</td><code>a_b</code>"
  assert hooks.on_page_content(cell) == "<td><code>a_<wbr>b/<wbr>c.<wbr>py</code> a_b</td><code>a_b</code>"


def test_every_seam_is_in_the_table():
  text = (ROOT / "docs" / "hooks.md").read_text()
  rows = re.findall(r"^\| ([^|]+) \| `(\w+\.py)` \|", text, re.MULTILINE)
  assert [name for name, _ in rows] == [seam.name for seam in plugin.REGISTRY.seams]
  for name, file in rows:
    (seam,) = [seam for seam in plugin.REGISTRY.seams if seam.name == name]
    assert type(seam).__module__ == f"maxtext_ling2.host.seams.{file.removesuffix('.py')}"
  for file in re.findall(r"`((?:\w+/)?test_\w+\.py)`", text.split("## The seams")[1]):
    assert list((ROOT / "tests").rglob(Path(file).name)), file


def test_errors_in_the_table_are_in_the_code():
  """All words of each text, between the values in it, stand in the package's source; MaxText's and XLA's are marked."""
  source = "\n".join(path.read_text() for path in (ROOT / "maxtext_ling2").rglob("*.py"))
  joined = re.sub(r"[\"']\n\s*f?[\"']|\{[^{}]*\}", "", source)
  words = re.compile(r"(?<![\w.-])[A-Za-z][A-Za-z ,]{3,}(?![\w.-])")  # none cut from a name, which may be a value
  table, checked = (ROOT / "docs" / "troubleshooting.md").read_text(), 0
  for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE):
    if "(MaxText's)" in row or "(XLA's)" in row:
      continue
    for text in re.findall(r"`([^`]+)`", row):
      pieces = [piece.strip() for part in re.split(r"\.\.\.|'", text) for piece in words.findall(part)]
      assert not (missing := [piece for piece in pieces if piece not in joined]), (text, missing)
      checked += bool(pieces)
  assert checked > 90


def blocks(page, language):
  """The texts of a page's blocks in a language."""
  return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_python_blocks_have_tests():
  """Below, in test_architecture.py and, for convert.md, in exported_code (PyTorch); a new block needs one more."""
  found = {page.name: len(blocks(page, "python")) for page in PAGES if blocks(page, "python")}
  assert found == {"another_plugin.md": 2, "api.md": 1, "convert.md": 1, "data.md": 1}


def test_python_of_the_data_page(tmp_path):
  (text,) = blocks(ROOT / "docs" / "data.md", "python")
  assert text.count("/data/") == 1
  exec(compile(text.replace("/data/", f"{tmp_path}/"), "data.md", "exec"), {})
  assert np.fromfile(tmp_path / "web.bin", np.uint16).tolist() == [5, 6, 7, 2, 8, 9, 2]
  assert (tmp_path / "web.idx").is_file()


def test_the_patch_applies():
  """Its old lines stand in the installed file, once, where it says; with the new ones in their place it is Python."""
  spec = importlib.util.find_spec("maxtext")
  (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "upstream_patch.md").read_text(), re.DOTALL)
  start, body = re.search(r"^@@ -(\d+),\d+ .*? @@\n(.*)", diff, re.DOTALL | re.MULTILINE).groups()
  lines = body.splitlines(keepends=True)
  old = "".join(line[1:] for line in lines if line[0] != "+")
  new = "".join(line[1:] for line in lines if line[0] != "-")
  text = Path(spec.origin).read_text()
  assert text.count(old) == 1 and text[: text.index(old)].count("\n") == int(start) - 1
  assert "_load_plugins" not in text
  compile(text.replace(old, new), "maxtext/__init__.py", "exec")
