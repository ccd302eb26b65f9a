"""The three stages, one loop each, written on the engine's steps."""
