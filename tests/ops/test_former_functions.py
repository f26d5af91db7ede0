"""Former names of public functions, which work for one release."""

import pytest

from maxtext_ling2.ops import fused_norm, gla

FORMER = [
  (gla, "gla_over_ranks", gla.gla_context_parallel),
  (gla, "rotated_norm", fused_norm.qk_norm_rope),
  (gla, "gated_norm", fused_norm.grouped_rms_norm_gated),
]


@pytest.mark.parametrize(("module", "name", "function"), FORMER)
def test_a_former_name_works_and_warns_with_the_new_one(module, name, function):
  with pytest.warns(DeprecationWarning, match=f"{name} is now .*{function.__name__}"):
    assert getattr(module, name) is function
