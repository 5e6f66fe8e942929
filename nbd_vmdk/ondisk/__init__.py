"""Bytes and values: pure functions over on-disk structures; no file is opened here."""
