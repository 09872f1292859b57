"""What may repair a divergence: one kind a file, each a function that yields proposals with their reason."""
