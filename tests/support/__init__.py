"""What more than one test module uses; a test module imports from here, never from another test module."""

import pytest

pytest.register_assert_rewrite("support.builds")  # its asserts report values, as those of a test do
