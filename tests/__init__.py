"""Tests of nbd-vmdk, and the builders of the images they read."""
