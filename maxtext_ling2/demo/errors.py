"""The one error of the demo: something that its user has to know, in words."""

from maxtext_ling2.errors import Ling2Error


class DemoError(Ling2Error):
  """The demo cannot go on, or has not shown what it is there to show; the text says why and what to do."""
