"""ZipCache (arXiv 2405.14256): a KV cache with more bits for salient tokens than for others."""
