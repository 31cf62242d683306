"""The system tests: real processes, a real Postgres, and the Mitto simulator as their oracle."""

import pytest

pytest.register_assert_rewrite("system.harness")
