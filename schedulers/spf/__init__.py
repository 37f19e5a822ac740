"""Shortest prefill first, with ageing."""
