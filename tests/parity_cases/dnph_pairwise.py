"""DNpH: the authors' code, in the only form that its trainer uses."""

from torch import Tensor

from common.errors import UserError
from tests.parity_cases.base import PooledCase, Tree


class Case(PooledCase):
    """A case of DNpH."""

    def model_section(self) -> Tree:
        """Our settings.

        Raises:
            UserError: If the case used an option of the loss that the authors' trainer never sets.
        """
        s = self.settings
        if not (s["use_cosine"] and s["use_square_clamp"] and s["M"] == 0):
            raise UserError("only cosines with square clamping and the batch's share of similar pairs are offered")
        return {"dropout": self.cfg["dropout"]}

    def terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same terms; the recorded cases have their sum alone."""
        names = {"image": "information_image", "text": "information_text", "cross": "information_cross"}
        return {theirs: terms[ours] for theirs, ours in names.items()}
