"""What the seams call of ours is there, and a name that is not is told."""

import pytest

from maxtext_ling2 import plugin
from maxtext_ling2.errors import Ling2Error
from maxtext_ling2.host.lazy import Lazy

NAMED = {value.target for seam in plugin.REGISTRY.seams for value in vars(seam).values() if isinstance(value, Lazy)}


@pytest.mark.parametrize("target", sorted(NAMED))
def test_all_that_the_plugin_names_is_there(target):
  assert callable(Lazy(target).resolved())


def test_all_that_it_names_is_found():
  assert {"maxtext_ling2.model.decoder:Ling2Decoder", "maxtext_ling2.checkpoint.lora:exporter"} < NAMED


def test_it_is_called_with_all_arguments():
  assert Lazy("builtins:dict")({"a": 1}, b=2) == {"a": 1, "b": 2}


@pytest.mark.parametrize("target", ["maxtext_ling2.errors:Nothing", "maxtext_ling2.nothing:anything"])
def test_a_name_that_is_gone_is_told(target):
  with pytest.raises(Ling2Error, match=f"{target} cannot be imported .*; install maxtext-ling2 again"):
    Lazy(target)()
