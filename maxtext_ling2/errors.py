"""The one error class that may stop a process: LING2 was asked for and cannot be had whole."""


class Ling2Error(RuntimeError):
  """LING2 was asked for, but the installed MaxText does not offer what it needs.

  `fatal` tells the start-up module to let the error through: a plugin that fails in any other way is reported and
  left out, but a process that asked for LING2 must not go on without it.
  """

  fatal = True
