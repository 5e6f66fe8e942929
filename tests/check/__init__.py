"""Tests of checking and repairing."""
