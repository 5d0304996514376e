"""Data shards: tokens, examples, and the loss of a task."""
