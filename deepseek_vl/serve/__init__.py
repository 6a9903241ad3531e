"""The engine and what stands on it."""
