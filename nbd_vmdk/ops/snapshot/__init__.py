"""Snapshots: making child links, showing the tree, merging, moving and removing links."""
