"""Seam: what is wrong with Megatron files ends a LING2 run with one sentence and exit code 1.

MaxText's trainers take an error of the data for the end of it and end with exit code 0, or, in evaluation and while files
are opened, with a traceback. At the end of any run, its `close` of grain's iterators fails in `__del__`, which Python
prints: it asks for an attribute that raises AssertionError.
"""

from collections.abc import Callable
from typing import Any, NoReturn

from maxtext_ling2.configs import documents
from maxtext_ling2.errors import DataError, reason_of
from maxtext_ling2.host.contract import expect
from maxtext_ling2.host.patches import Call
from maxtext_ling2.host.seam import Seam, Use
from maxtext_ling2.host.trainer import running_trainer

_INTERFACE = "maxtext.input_pipeline.input_pipeline_interface"
_ITERATORS = "maxtext.input_pipeline.multihost_dataloading"
_FILES = ("grain_train_files", "grain_eval_files")
_MARK = "_reads_for_ling2"
"""An attribute of iterators of LING2 runs. A set of weak references would not have one that is being deleted."""


class DataErrorsSeam(Seam):
  """Turns a DataError into an exit, which MaxText's trainers do not catch."""

  name = "errors in data"
  module = _INTERFACE
  use = Use("grain_file_type=mmap or mmap_npy", documents.reads_mmap, "take other data")
  expectations = (
    *expect(_INTERFACE, "create_data_iterator(config, mesh)"),
    *expect(_ITERATORS, "MultiHostDataLoadIterator._get_next_batch_sharded()", "MultiHostDataLoadIterator.close()"),
  )

  def apply(self) -> None:
    from maxtext.input_pipeline import input_pipeline_interface, multihost_dataloading

    self.patches.wrap_for_ling2(input_pipeline_interface, "create_data_iterator", _create)
    self.patches.wrap(multihost_dataloading.MultiHostDataLoadIterator, "_get_next_batch_sharded", _next)
    self.patches.wrap(multihost_dataloading.MultiHostDataLoadIterator, "close", _close)


def _create(call: Call) -> Any:
  """As MaxText's `create_data_iterator`; what its readers of Megatron files raise becomes a DataError."""
  if not documents.reads_mmap(call.config):
    return call.original()
  try:
    train, evaluation = call.original()
  except (OSError, ValueError, EOFError) as error:
    reason = reason_of(error, DataError)
    if reason is None:
      names = [f"{name}={value!r}" for name in _FILES if (value := getattr(call.config, name))]
      reason = f"{' '.join(names)}: MaxText cannot read these Megatron files ({error}); correct the setting or the files"
    _end(reason, error)
  for iterator in (*(train if isinstance(train, list) else [train]), evaluation):
    if iterator is not None:
      setattr(iterator, _MARK, True)
  return train, evaluation


def _next(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  """As MaxText's `next(iterator)` of batches."""
  try:
    return original(*args, **kwargs)
  except Exception as error:
    if (reason := reason_of(error, DataError)) is not None:
      _end(reason, error)
    raise


def _close(original: Callable[..., Any], iterator: Any, *args: Any, mark: str = _MARK, **kwargs: Any) -> Any:
  """As MaxText's `close`, without what it raises for each iterator of grain.

  It also runs while Python ends, when this module has no names any more; so the mark is a default.
  """
  try:
    return original(iterator, *args, **kwargs)
  except AssertionError:
    if not hasattr(iterator, mark):
      raise


def _end(reason: str, error: Exception) -> NoReturn:
  """Ends the process if it is one of MaxText's trainers.

  Raises:
    DataError: it is not, so whoever called can handle it.
    SystemExit: it is.
  """
  if running_trainer() is None:
    raise DataError(reason) from error
  raise SystemExit(f"Error: {reason}") from error
