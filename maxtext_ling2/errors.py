"""The errors that may stop a process: LING2 cannot be enabled completely, or a checkpoint is invalid."""


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
