"""From a trained method to a running search: what is indexed, where codes lie, how they are searched and served."""
