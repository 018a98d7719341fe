"""Checks the gradient of a user's own loss, and measures what it costs."""
