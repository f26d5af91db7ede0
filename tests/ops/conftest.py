"""Lets the assertions of the shared suite explain themselves as those of test files do."""

import pytest

pytest.register_assert_rewrite("gla_suite")
