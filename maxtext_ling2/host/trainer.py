"""Which of MaxText's trainers is running: a command that was called, or that runs as a file."""

import sys
from types import FrameType

_PACKAGE = "maxtext.trainers."


def running_trainer() -> str | None:
  """The innermost running module of `maxtext.trainers`, such as "pre_train.train"; None: there is none."""
  frame: FrameType | None = sys._getframe(1)
  while frame is not None:
    name = _module(frame)
    if name.startswith(_PACKAGE) and frame.f_code.co_name != "<module>":
      return name.removeprefix(_PACKAGE)
    frame = frame.f_back
  return None


def _module(frame: FrameType) -> str:
  """Name of a frame's module, also if it runs as a file."""
  name = str(frame.f_globals.get("__name__", ""))
  if name != "__main__":
    return name
  parts = str(frame.f_globals.get("__file__", "")).removesuffix(".py").replace("\\", "/").split("/")
  start = next((i for i in range(len(parts) - 2, -1, -1) if parts[i : i + 2] == ["maxtext", "trainers"]), None)
  return name if start is None else ".".join(parts[start:])
