"""What several test folders share; imported as `support` (tests/ is on pytest's path)."""
