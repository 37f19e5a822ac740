"""KVShare: reuse of KV across requests, in the middle of prompts."""
