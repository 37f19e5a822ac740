"""Scheduler policies; each folder is one technique."""
