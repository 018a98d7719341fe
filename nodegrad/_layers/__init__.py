"""Layers of a model, and a product of their weights that reports statistics."""
