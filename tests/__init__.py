"""Tests; a package so that they can import `tests.models` and `tests.serving`."""
