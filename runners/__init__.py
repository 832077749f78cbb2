"""The one loop, and evaluation."""
