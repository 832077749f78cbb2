"""DDBH: the collection's code, whose loss and step are those of the authors."""

from torch import Tensor

from tests.parity_cases.base import PooledCase, Tree


class Case(PooledCase):
    """A case of DDBH."""

    def model_section(self) -> Tree:
        """Our settings; how the heads start makes no difference, since the case has their weights."""
        return {
            "initialization": "fan_out",
            "dropout": self.cfg["dropout"],
            "percentile": self.settings["percent"],
            "quantization_weight": self.settings["quan_weight"],
        }

    def terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same terms under the reference's names."""
        return {
            "intra_image": terms["boundary_image"],
            "intra_text": terms["boundary_text"],
            "inter": terms["boundary_cross"],
            "quan_image": terms["quantization_image"],
            "quan_text": terms["quantization_text"],
        }
