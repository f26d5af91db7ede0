"""The error of the commands that run MaxText's."""

from maxtext_ling2.errors import Ling2Error


class StockCommandError(Ling2Error, ValueError):
  """MaxText's command cannot be run, or has not done its work; the text says why and what to do.

  Args:
    text: what to print.
    code: exit code of the command: MaxText's own, if it has failed.
  """

  def __init__(self, text: str, code: int = 1):
    super().__init__(text)
    self.code = code
