"""Whole links under other names, in other places, or gone: renaming, cloning, deleting all files of one."""
