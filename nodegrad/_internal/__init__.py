"""Used by all sub-packages: trees, batches, closure conversion, private names."""
