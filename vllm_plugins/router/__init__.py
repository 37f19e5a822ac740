"""The HTTP front of prefill/decode and encode/prefill/decode disaggregation."""
