"""Instances and their router on many machines."""
