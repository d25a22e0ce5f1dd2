"""Programs that run inside the environments of serving engines."""
