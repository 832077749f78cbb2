"""From files of pictures to pixels: reading, views, and where pictures are kept (cache, memory, worker processes)."""
