"""What every wing uses: trees, batches, closure conversion, private names."""
