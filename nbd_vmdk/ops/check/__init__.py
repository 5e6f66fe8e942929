"""Checking an image: every invariant of every kind of extent, over the whole chain, without opening a Disk.

What a Disk refuses to open is what most needs checking, so this works on the pure parsers and on storage.
Whole tables are looked at with numpy; the modules that import it are imported by those that need them.
"""
