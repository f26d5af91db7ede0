"""CI, hooks, templates, citation and CONTRIBUTING.md: they parse, and say what the files that they depend on say."""

import re
import shlex
from typing import Any

import pytest
import yaml

from sandbox import ROOT
from test_docs import script
from test_packaging import PROJECT

CONTRIBUTING = ROOT / "CONTRIBUTING.md"


def load(name: str) -> Any:
  return yaml.safe_load((ROOT / name).read_text())


def pythons() -> list[str]:
  """The versions that scripts/set_up takes without being told."""
  (versions,) = re.findall(r'^tested="([\d. ]+)"', (ROOT / "scripts" / "set_up").read_text(), re.MULTILINE)
  return versions.split()


def test_classifiers_are_the_pythons_that_set_up_takes() -> None:
  prefix = "Programming Language :: Python :: "
  named = [text.removeprefix(prefix) for text in PROJECT["classifiers"] if re.fullmatch(prefix + r"\d\.\d+", text)]
  assert named == pythons()
  assert PROJECT["requires-python"] == f">={named[0]}"


def test_ci_runs_what_anybody_can_run_on_each_python() -> None:
  job = load(".github/workflows/ci.yml")["jobs"]["ci"]
  assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
  assert job["strategy"]["matrix"]["python"] == pythons()
  assert job["env"]["PYTHON"] == "python${{ matrix.python }}"
  assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_hooks_are_the_linters_of_the_environment() -> None:
  repositories = load(".pre-commit-config.yaml")["repos"]
  assert [repository["repo"] for repository in repositories] == ["local"]  # another would be downloaded
  commands = [shlex.split(hook["entry"]) for hook in repositories[0]["hooks"]]
  made = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
  linters = [line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .") for line in made.splitlines()[1:]]
  assert [" ".join(word for word in command if word != "--force-exclude") for command in commands] == linters


@pytest.mark.parametrize("name", ["bug.yml", "addition.yml"])
def test_issue_forms_are_forms(name: str) -> None:
  form = load(f".github/ISSUE_TEMPLATE/{name}")
  fields = [field for field in form["body"] if field["type"] != "markdown"]
  assert form["name"] and form["description"] and fields
  assert all(field["attributes"]["label"] and field["validations"]["required"] for field in fields)
  assert len({field["id"] for field in fields}) == len(fields)


def test_the_citation_is_of_this_project() -> None:
  citation = load("CITATION.cff")
  assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
  assert citation["title"] == PROJECT["name"] and citation["license"] == PROJECT["license"]
  assert citation["authors"] == PROJECT["authors"]
  assert "version" not in citation  # its home is the package


def test_an_address_is_real_and_the_same_everywhere() -> None:
  addresses = PROJECT.get("urls", {})
  for address in addresses.values():
    assert re.fullmatch(r"https://[\w.-]+\.[a-z]+/[\w./#-]+", address) and "example" not in address
  site = re.search(r"^repo_url: (\S+)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
  homes = [site and site[1], load("CITATION.cff").get("repository-code")]
  assert homes == [addresses.get("Repository")] * 2


def test_the_changelog_has_a_place_for_what_comes() -> None:
  headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
  assert headings[0] == "[Unreleased]" and all(re.search(r"\d{4}-\d\d-\d\d$", heading) for heading in headings[1:])


def test_marks_and_links_of_contributing() -> None:
  docs_test = script("docs_test")
  found = docs_test.blocks(CONTRIBUTING)
  assert [block.problem() for block in found] == [None] * 2
  assert list(docs_test.broken_links(CONTRIBUTING)) == []


def test_terms_of_the_glossary_are_in_use() -> None:
  """Each in the package or on a page; upper case is kept."""
  glossary = CONTRIBUTING.read_text().partition("## Glossary")[2].partition("\n## ")[0]
  terms = re.findall(r"\*\*([^*]+)\*\*", glossary)
  assert len(terms) >= 20 and len(set(terms)) == len(terms)
  files = [*(ROOT / "maxtext_ling2").rglob("*.py"), *(ROOT / "docs").glob("*.md")]
  text = " ".join(" ".join(path.read_text() for path in files).split())
  assert [term for term in terms if not re.search(rf"\b{term}s?\b", text, re.IGNORECASE if term.islower() else 0)] == []
