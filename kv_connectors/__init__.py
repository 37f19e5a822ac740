"""KV connectors; each folder is one technique."""
