"""The service: owner loop, configuration, metrics, health, command line."""
