"""Preparation of data sets: one script each, `data/make_<name>.py`; the prepared data lie beside them, outside git."""
