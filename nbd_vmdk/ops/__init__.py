"""Whole-image questions and work."""
