"""The optimizers that the YAML's `optim:` section may name: registered classes, built by `common/optim.py`."""
