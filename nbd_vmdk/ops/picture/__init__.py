"""Pictures of a disk: what is where, for a terminal and as a page for a browser."""
