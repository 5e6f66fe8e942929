"""Proof by exhaustion that a power cut loses nothing: workloads, the states that cuts leave, and a judge."""
