"""The arithmetic of accumulation: torch only, no configuration, no tracking."""
