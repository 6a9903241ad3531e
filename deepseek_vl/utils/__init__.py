"""Conversation templates and checkpoint and image loading."""
