"""The errors that may stop a process: LING2 cannot be enabled completely, a checkpoint or the data are invalid."""


class Ling2Error(RuntimeError):
  """LING2 was requested, but cannot work.

  `fatal` tells the start-up module to raise the error: a plugin that fails in any other way is reported and skipped, but
  a process that requested LING2 must not continue without it.
  """

  fatal = True


def describe(error: OSError) -> str:
  """Formats an error of the operating system as a sentence: path, reason, what to do."""
  if error.filename is None:
    return str(error)
  return f"{error.filename}: {error.strerror}; name a path that exists and may be read or written"


class CheckpointError(Ling2Error, ValueError):
  """A checkpoint, one of its files, or the target of a new one is invalid; the text says what to do."""


class OptionError(Ling2Error, ValueError):
  """Options of a command contradict each other, or have nothing to work on."""


INSTALL = "pip install 'maxtext-ling2[tpu]' (also right for CPUs; [cuda12] for NVIDIA GPUs)"
"""What installs the plugin together with MaxText's dependencies, which come with an extra only."""


def missing_dependency(error: ImportError) -> str | None:
  """What to do about a module that is not installed; None where the error is another one."""
  if not isinstance(error, ModuleNotFoundError) or error.name is None:
    return None
  if error.name.partition(".")[0] == "maxtext_ling2":
    return None
  return f"{error.msg}, which MaxText needs; run: {INSTALL}"


class DataError(Ling2Error, ValueError):
  """Training data, or the settings that name them, are invalid; the text names the file and says what to do."""


def reason_of(error: BaseException, kind: type[Ling2Error]) -> str | None:
  """The text of the error of a kind that led to an error, or None: it was another."""
  cause: BaseException | None = error
  while cause is not None:
    if isinstance(cause, kind):
      return str(cause)
    cause = cause.__cause__ or cause.__context__
  return None
