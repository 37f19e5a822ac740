"""Speculative decoding: drafters, and how they are trained."""
