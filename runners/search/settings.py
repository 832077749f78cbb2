"""Schema of the `search:` section; its values stand in `configs/search.yaml`."""

from typing import Literal

from pydantic import Field

from common.schemas import Section


class SearchConfig(Section):
    """`search:` section."""

    engine: str  # registered name: flat, ivf, milvus, pgvector
    address: str | None  # of the engine's server: a Milvus address, a PostgreSQL connection string; null: none
    collection: str = Field(pattern=r"^[a-z][a-z0-9_]{0,47}$")  # name of the rows on a server
    lists: int = Field(gt=0)  # ivf: lists that codes are dealt into; fewer where there are fewer than 39 codes a list
    probes: int = Field(gt=0)  # ivf: lists that a query looks into; more find more, and take longer
    k: int = Field(gt=0)  # hits shown
    find: Literal["image", "text", "both"] | None  # kind of the hits; null: pictures for a text, both for a picture
    batch_size: int | None = Field(gt=0)  # pictures or texts encoded at a time; null: as many as in the evaluation
    save_every: int = Field(gt=0)  # rows after which what was encoded is made durable, for an indexing that is killed
