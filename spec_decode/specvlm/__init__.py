"""SpecVLM: a drafter that sees a compressed image (arXiv 2509.11815).

The rows of the draft layer that stand for an image are replaced by fewer ones, by an operator that
a gate picks for the question. The operators, the gate and the drafter are plain torch, for training
and serving alike.
"""
