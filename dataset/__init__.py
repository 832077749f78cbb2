"""Data sets, their splits, checks and loaders; how pictures and texts become tensors lies in rooms of its own."""
