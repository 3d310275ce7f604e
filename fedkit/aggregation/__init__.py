"""Uploads → new global arrays."""
