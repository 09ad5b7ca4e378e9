"""What several test folders share; imported as `support` (tests/shared is on pytest's path)."""
