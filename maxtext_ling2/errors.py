"""The errors that may stop a process: LING2 cannot be had whole, or a checkpoint is not what it must be."""


class Ling2Error(RuntimeError):
  """LING2 was asked for, but what it needs is not there.

  `fatal` tells the start-up module to let the error through: a plugin that fails in any other way is reported and
  left out, but a process that asked for LING2 must not go on without it.
  """

  fatal = True


def describe(error: OSError) -> str:
  """An error of the operating system as a sentence: which path, what is wrong with it, what to do."""
  if error.filename is None:
    return str(error)
  return f"{error.filename}: {error.strerror}; name a path that is there and may be read or written"


class CheckpointError(Ling2Error, ValueError):
  """A checkpoint, a file of one, or the place for a new one is not what it must be; the text says what to do."""
