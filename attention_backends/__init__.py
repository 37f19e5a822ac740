"""Plug-ins that are attention backends."""
