"""Networks: from a configuration or the user's own function to a model with weights, and its layers."""
