"""The kinds of extent, one module each."""
