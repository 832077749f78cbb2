"""One file per method, and the blocks that two or more share."""
