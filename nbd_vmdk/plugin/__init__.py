"""What runs inside nbdkit: its callbacks, and what they need besides the engine."""
