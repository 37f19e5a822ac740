"""ZipCache's kernels in Triton: writing, scoring, sealing, and attention over packed pages."""
