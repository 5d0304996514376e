"""Networks: built, found in a configuration or the user's own; their blocks."""
