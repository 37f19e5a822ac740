"""pd: prefill/decode disaggregation after DistServe."""
