"""Sarathi-Serve: stall-free batches under a token budget sized by a time-between-tokens target."""
