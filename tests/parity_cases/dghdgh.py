"""DGHDGH: the authors' loss, with what the release lacks supplied."""

import re

from torch import Tensor

from tests.parity_cases.base import PooledCase, Tree


class Case(PooledCase):
    """A case of DGHDGH."""

    gradients = {"loss": "grad/", "classifier": "grad_cz/", "generator": "grad_gen/"}
    noise = re.compile(r"\.k_linear\.bias$")  # softmax ignores what all its entries share

    def model_section(self) -> Tree:
        """Our settings."""
        s = self.settings
        return {
            "dropout": self.cfg["dropout"],
            "graph_layers": s["n_layers"],
            "graph_heads": s["n_heads"],
            "graph_dropout": 0.0,  # that of the cases, whatever the release has
            "margin": s["margin"],
            "triplet_weight": s["lambda1"],
            "graph_weight": s["lambda2"],
            "trust": s["alpha"],
            "ripeness": s["beta"],
            "adaptive_weight": False,
            "classifier_weight": s["lambda4"],
            "class_weight": s["lambda5"],
            "nearness_weight": s["lambda6"],
            "diversity_weight": s["lambda7"],
        }

    def optim_section(self) -> Tree:
        """The authors' BertAdam, and an Adam each for generator and classifier."""
        recorded = self.cfg["optimizer"]
        adams = {
            name: {
                "type": recorded[theirs]["arch"],
                "lr": {name: recorded[theirs]["lr"]},
                "b1": recorded[theirs]["b1"],
                "b2": recorded[theirs]["b2"],
                "eps": recorded[theirs]["e"],
                "weight_decay": recorded[theirs]["weight_decay"],
                "max_grad_norm": recorded[theirs].get("global_clip", 0.0),
                "milestones": [],
                "milestone_factor": 1.0,
            }
            for name, theirs in (("generator", "gnn"), ("classifier", "classifier"))
        }
        return {**super().optim_section(), **adams}

    def terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same terms under the reference's names."""
        return {
            "J_r": terms["triplet"],
            "J_gca": terms["graph"],
            "J_syn": terms["synthetic"],
            "lambda3": terms["synthetic_weight"],
            "J_cz": terms["classifier"] / self.settings["lambda4"],
            "J_ce": terms["of_class"],
            "J_sim": terms["nearness"],
            "J_div": terms["diversity"],
            "J_gen": terms["generator"],
        }
