"""Data: files and datasets to windows of tokens, or to examples, and the losses that take them."""
