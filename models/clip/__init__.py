"""CLIP: towers, weight files."""
