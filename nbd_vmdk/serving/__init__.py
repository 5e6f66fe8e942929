"""Servers, seen from outside: nbdkit started, listened for, watched, restarted and ended."""
