"""The error of the demo."""

from maxtext_ling2.errors import Ling2Error


class DemoError(Ling2Error):
  """The demo cannot continue, or the model has not learned; the text says why and what to do."""
