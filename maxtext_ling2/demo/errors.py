"""The one error of the demo: something that its user has to know, in words."""


class DemoError(RuntimeError):
  """The demo cannot go on, or has not shown what it is there to show; the text says why and what to do."""
