"""DSPH: the authors' code and the unified peer's, which have the same head and loss."""

from torch import Tensor

from common.errors import UserError
from tests.parity_cases.base import PooledCase, Tree


class Case(PooledCase):
    """A case of DSPH."""

    def model_section(self) -> Tree:
        """Our settings; the threshold is the one that the reference read from its table, if the case says which."""
        s = self.settings
        if s.get("hash_func", "tanh") != "tanh":
            raise UserError(f"a head with hash_func {s['hash_func']!r} is not offered, only tanh")
        return {
            "dropout": self.cfg["dropout"],
            "threshold": s.get("threshold"),
            "separation_weight": s["alpha"],
            "proxy_seed": s["hypseed"],
        }

    def optim_section(self) -> Tree:
        """BertAdam for all but the proxies, which have their SGD."""
        recorded = self.cfg["optimizer"]["hyp"]
        proxies = {
            "type": "SGD",
            "lr": {"proxies": recorded["lr"]},
            "momentum": recorded["momentum"],
            "weight_decay": recorded["weight_decay"],
            "nesterov": False,
            "schedule": "constant",
        }
        return super().optim_section() | {"proxies": proxies}

    def terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Two sums: everything about proxies, and everything about pairs with its weight."""
        pairs = terms["separation_image"] + terms["separation_text"] + terms["separation_cross"]
        return {"proxy": terms["proxy_image"] + terms["proxy_text"], "reg": self.settings["alpha"] * pairs}
