"""Data sets of pictures, texts and labels: reading, splits, tokens, transforms, loaders."""
