"""Plug-ins that drop visual tokens, in the language model or before it."""
