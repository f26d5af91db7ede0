"""A diagnosis for people: the verdict, what to do, then what was found."""

from collections.abc import Iterator

from rich.text import Text

from maxtext_ling2 import terminal
from maxtext_ling2.doctor.checks import Diagnosis


def lines(found: Diagnosis, *, verbose: bool = False) -> Iterator[Text]:
  """The diagnosis, a line at a time.

  Args:
    found: the diagnosis.
    verbose: also how the plugin was started, every seam and every field.
  """
  yield Text("A LING2 run would work.", "green") if found.ok else Text("A LING2 run would not work.", "red")
  for kind, style, issues in (("fault", "red", found.faults), ("note", "yellow", found.notes)):
    for issue in issues:
      yield _line(kind, issue.what, style)
      yield _line("", f"remedy: {issue.remedy}")
  tested = ", ".join(found.versions.get("tested maxtext", ()))
  installed = {name: version for name, version in found.versions.items() if name != "tested maxtext"}
  versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in installed.items())
  yield _line("versions", f"{versions}; tested with MaxText {tested}")
  if found.backends:
    devices = found.backends["devices"]
    yield _line("backend", f"{found.backends['platform']}, {len(devices)} device{'' if len(devices) == 1 else 's'}")
  if found.models:
    yield _line("models", ", ".join(name + (f": {problem}" if problem else "") for name, problem in found.models.items()))
  yield from _contracts(found)
  set_variables = [f"{name}={value}" for name, value in found.environment.items() if value is not None]
  if set_variables or verbose:
    yield _line("environment", ", ".join(set_variables) or "nothing set")
  if verbose:
    yield from _details(found)


def _contracts(found: Diagnosis) -> Iterator[Text]:
  if found.checked:
    yield _line(
      "contracts",
      f"MaxText and the models were found fine on {found.checked}, and nothing installed has changed since (--verbose "
      "checks them again)",
    )
  elif found.seams:
    fit = sum(not seam["breaches"] for seam in found.seams)
    yield _line("contracts", f"MaxText has what {fit} of {len(found.seams)} seams need (--verbose lists them)")


def _details(found: Diagnosis) -> Iterator[Text]:
  yield _line("start-up", f"found by: {found.start['found_by'] or 'none'}")
  for record in found.start.get("plugins", ()):
    yield _line("", f"plugin {record['name']}: {record['state']} ({record['distribution']} {record['version']})")
  for seam in found.seams:
    yield _line("seam", f"{seam['name']}: {seam['state']}")
  for field, owner in found.fields.items():
    yield _line("field", f"{field}: {owner}")


def _line(label: str, text: str, style: str = "bold") -> Text:
  return terminal.labelled(f"{label:12}", style, text)
