"""One file a method, on the contract in `base.py`; `clip/` is the backbone, `blocks/` what several methods share."""
