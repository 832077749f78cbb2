"""Questions to an index in the user's words: a text, a picture, or more like an item."""

from pathlib import Path
from typing import Self

from common.codes import Codes
from common.errors import UserError
from runners.encoder import Encoder, Picture
from runners.search.building import MODEL
from runners.search.engine import KINDS, Kind
from runners.search.index import Hit, Index

FINDS: dict[str, tuple[Kind, ...]] = {"image": ("image",), "text": ("text",), "both": KINDS}


class Searcher:
    """An index and the model whose codes it holds.

    Args:
        index: The index, open.
        encoder: Its model.

    Raises:
        UserError: If they do not belong together.
    """

    def __init__(self, index: Index, encoder: Encoder) -> None:
        if encoder.fingerprint != index.header.fingerprint:
            raise UserError(
                f"{encoder.path} is not the model whose codes the index {index.folder} holds ({index.header.model}); "
                "index again with that checkpoint"
            )
        self.index = index
        self.encoder = encoder

    @classmethod
    def open(cls, folder: str | Path, *, device: str = "auto", overrides: list[str] | None = None) -> Self:
        """Opens an index with the model that lies beside its codes.

        Args:
            folder: The index's folder.
            device: Where to encode.
            overrides: Entries `search.key=value`.

        Raises:
            UserError: If there is no index, or it is damaged.
        """
        index = Index.open(folder, overrides=overrides or [])
        try:
            path = Path(folder) / MODEL
            if not path.is_file():
                raise UserError(f"index {folder} is damaged: {MODEL} is missing; index again with the same checkpoint")
            return cls(index, Encoder.load(path, device=device, bits=index.header.bits))
        except BaseException:
            index.close()
            raise

    def by_texts(
        self, texts: list[str], k: int | None = None, kinds: tuple[Kind, ...] | None = None
    ) -> list[list[Hit]]:
        """Hits of texts.

        Args:
            texts: The questions.
            k: Hits wanted of each; None for `search.k`.
            kinds: What is found; None for `search.find`, and pictures without it.
        """
        return self.by_codes(self.encoder.texts(texts), k, kinds or self.finds("text"))

    def by_pictures(
        self, pictures: list[Picture], k: int | None = None, kinds: tuple[Kind, ...] | None = None
    ) -> list[list[Hit]]:
        """Hits of pictures, as `by_texts`; without `search.find` both pictures and texts are found."""
        return self.by_codes(self.encoder.images(pictures), k, kinds or self.finds("image"))

    def like_item(self, item: int, k: int | None = None, kinds: tuple[Kind, ...] | None = None) -> list[Hit]:
        """Hits of what an item's own code asks for, without the item.

        Raises:
            KeyError: If there is no such item.
        """
        wanted = self.index.config.k if k is None else k
        kind = self.index.hit(item).kind
        hits = self.by_codes(self.index.codes([item]), wanted + 1, kinds or self.finds(kind))[0]
        return [hit for hit in hits if hit.id != item][:wanted]

    def by_codes(self, codes: Codes, k: int | None, kinds: tuple[Kind, ...]) -> list[list[Hit]]:
        """Hits of codes of Q questions."""
        return self.index.search(codes, k, kinds)

    def finds(self, asked: Kind) -> tuple[Kind, ...]:
        """What a question of a kind finds unless told otherwise."""
        find = self.index.config.find
        if find is not None:
            return FINDS[find]
        return ("image",) if asked == "text" else KINDS

    def close(self) -> None:
        """Closes the index."""
        self.index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
