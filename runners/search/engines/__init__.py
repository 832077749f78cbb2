"""Where codes are kept and searched: one file an engine, on the contract in `runners/search/engine.py`."""
