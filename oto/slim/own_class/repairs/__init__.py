"""The kinds of repair, one per file: each is a function that yields proposals with their reasons."""
