"""What is shown of the log of a stock command: its stages, LING2's own lines, and why it has failed."""

import difflib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_LAST_LINES = 15
_LONGEST_LINE = 400

_PREFIX = re.compile(r"^(?P<level>[IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (?P<file>[\w.]+):\d+\] (?P<text>.*)$")
"""A line of absl's logging, which MaxText uses."""

_STAGES = {
  "System Information": "building the model",
  "restoring from this run's directory": "restoring the checkpoint",
  "HloModule dump enabled": "compiling the training step",
  "number parameters": "running the first step",
}
"""Texts that open a stage of a trainer before its first step, and what it is shown as."""

_EVALUATION = re.compile(r"Completed eval after train step (\d+), loss=([\d.naif]+), perplexity=([\d.naif]+)")
_RESTORED = re.compile(r"restoring from this run's directory step (\d+)")
_DEVICES = re.compile(r"Num_devices: (\d+)")
_OWN = ("maxtext-ling2: ", "LING2: ")
_STOPPED = "maxtext-ling2: stopped by "

_FRAME = "Traceback (most recent call last):"
_CONFIG_ERROR = "MAXTEXT CONFIG ERROR: "
_EXCEPTION = re.compile(r"^(?P<name>(?:\w+\.)*\w+)(?:: (?P<text>.*))?$", re.DOTALL)
_NO_FIELD = re.compile(r"^'(?P<key>[^']+)' not in (?P<fields>'.*)\.$", re.DOTALL)
_PYDANTIC = re.compile(r"\d+ validation errors? for \w+\n(?P<errors>.*)", re.DOTALL)


class Log:
  """The log of a command that is running.

  Args:
    path: the file; what it holds already is of former runs.

  Attributes:
    stage: what the command is doing, before it reports steps; None: not known yet.
    devices: number of devices of the run; None: not known.
    says_stopped: whether the trainer has said that a signal has stopped it, and what was saved.
  """

  def __init__(self, path: Path):
    self.path = path
    self._begin = self._position = path.stat().st_size if path.is_file() else 0
    self._shown: set[str] = set()
    self.stage: str | None = None
    self.devices: int | None = None
    self.says_stopped = False

  def lines(self) -> Iterator[str]:
    """The lines that were completed since the last call."""
    if not self.path.is_file():
      return
    with self.path.open("rb") as file:
      file.seek(self._position)
      whole, newline, _ = file.read().rpartition(b"\n")
    self._position += len(whole) + len(newline)
    # A progress bar writes carriage returns.
    yield from re.split(r"[\r\n]+", whole.decode(errors="replace")) if newline else ()

  def news(self, also: re.Pattern[str] | None = None) -> Iterator[str]:
    """Lines to show, of those that were completed since the last call; notes stage and devices.

    Args:
      also: lines to pass on as they are.
    """
    for line in self.lines():
      found = line if also and also.search(line) else self._read(line)
      if found is not None and found not in self._shown:
        self._shown.add(found)
        yield found

  def _read(self, line: str) -> str | None:
    match = _PREFIX.match(line)
    text = match["text"] if match else line
    if text.startswith(_OWN):
      self.says_stopped |= text.startswith(_STOPPED)
      return text
    self.stage = next((stage for opening, stage in _STAGES.items() if opening in text), self.stage)
    if devices := _DEVICES.search(text):
      self.devices = int(devices[1])
    if restored := _RESTORED.search(text):
      return f"going on after step {restored[1]}"
    if evaluation := _EVALUATION.search(text):
      return f"evaluation after step {evaluation[1]}: loss {evaluation[2]}, perplexity {evaluation[3]}"
    if match and match["level"] in "WEF" and match["file"] in _own_files():
      return f"warning: {text}"
    return None

  def text(self) -> str:
    """All that this run has written."""
    with self.path.open("rb") as file:
      file.seek(self._begin)
      return file.read().decode(errors="replace")

  def reason(self) -> str:
    """Why the run has failed, and where to read more: the exception's text, else the last lines."""
    text = self.text()
    found = explain(text)
    if found is None:
      return "\n".join([f"the last lines of {self.path}:", *text.splitlines()[-_LAST_LINES:]])
    return f"{found}\nall of it is in {self.path}"


def explain(text: str) -> str | None:
  """The text of the exception, or of MaxText's refusal of its settings, that ends a log; None: there is none."""
  return _exception(text) or _config_error(text)


@cache
def _own_files() -> frozenset[str]:
  """Names of this package's files, by which absl marks its warnings."""
  return frozenset(path.name for path in Path(__file__).parents[1].rglob("*.py"))


def _exception(text: str) -> str | None:
  """The text of the exception that ends the last traceback; with its class, unless it is one of ours."""
  _, found, rest = text.rpartition(_FRAME)
  lines = rest.splitlines()[1:]
  begin = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), None)
  if not found or begin is None:
    return None
  end = next((i for i, line in enumerate(lines[begin:], begin) if _PREFIX.match(line)), len(lines))
  match = _EXCEPTION.match("\n".join(lines[begin:end]).strip())
  if match is None or match["name"] == "KeyboardInterrupt":
    return None
  given = match["text"] or ""
  message, name = _readable(given), match["name"]
  if message and (name.startswith(("maxtext_ling2.", "pydantic_core.")) or _NO_FIELD.match(given)):
    return message
  return f"{name.rpartition('.')[2]}: {message}"


def _config_error(text: str) -> str | None:
  """MaxText's reason to refuse the settings where it ends without a traceback."""
  _, found, rest = text.rpartition(_CONFIG_ERROR)
  lines = rest.splitlines()
  end = next((i for i, line in enumerate(lines) if _PREFIX.match(line)), len(lines))
  return _readable("\n".join(lines[:end]).strip()) if found else None


def _readable(message: str) -> str:
  """A message without what pydantic appends to it, and without MaxText's list of all fields."""
  if unknown := _NO_FIELD.match(message):
    close = difflib.get_close_matches(unknown["key"], re.findall(r"'([^']+)'", unknown["fields"]), n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "docs/settings.md lists those that a LING2 run reads"
    return f"{unknown['key']}: MaxText has no such setting; {hint}"
  if listed := _PYDANTIC.match(message):
    lines = [re.sub(r" \[type=.*$", "", line) for line in listed["errors"].splitlines()]
    kept = [line.strip().removeprefix("Value error, ") for line in lines if "For further information visit" not in line]
    message = "\n".join(kept)
  return "\n".join(line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]} ..." for line in message.splitlines())
