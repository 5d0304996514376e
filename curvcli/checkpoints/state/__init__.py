"""Optimizer state to parameter names, and whether weights and moments can be believed."""
