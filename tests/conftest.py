"""Fixtures that several test files use."""

from tests.browser import browser, visit

__all__ = ["browser", "visit"]
