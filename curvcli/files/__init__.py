"""Untrusted bytes: limits, loading without executing, tensors, URLs, runs."""
