"""The JSON service and the page: questions to an index over HTTP.

No path and no address that a client sends is ever opened: pictures come as bytes, thumbnails are those of items.
"""

import io
import logging
import threading
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, File, HTTPException, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as AnyHTTPException

from common.errors import UserError
from common.schemas import Section
from dataset.pictures.opening import as_rgb, opened
from runners.encoder import read_picture
from runners.search.embedded import CODES
from runners.search.engine import Kind
from runners.search.index import Hit, Index
from runners.search.searcher import FINDS, Searcher

logger = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
LONGEST_TEXT = 2000  # characters of a question
LOCAL = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
Find = Literal["image", "text", "both"]


class ServeConfig(Section):
    """`serve:` section; `configs/serve.yaml` is its reference page."""

    host: str  # address to listen at
    port: int = Field(ge=0, lt=65536)  # 0: one that is free
    most_hits: int = Field(gt=0)  # of a question
    most_questions: int = Field(gt=0)  # of a batch
    upload_bytes: int = Field(gt=0)  # of a request
    upload_pixels: int = Field(gt=0)  # of an uploaded picture
    thumbnail: int = Field(gt=0, le=4096)  # pixels of the longer side


class TextQuestion(BaseModel):
    """Body of a search by text."""

    model_config = ConfigDict(extra="forbid")
    text: str = Field(min_length=1, max_length=LONGEST_TEXT)
    k: int | None = Field(default=None, ge=1)
    find: Find | None = None


class TextQuestions(BaseModel):
    """Body of a search by several texts."""

    model_config = ConfigDict(extra="forbid")
    texts: list[Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT)]] = Field(min_length=1)
    k: int | None = Field(default=None, ge=1)
    find: Find | None = None


class FoundItem(BaseModel):
    """One hit."""

    id: int = Field(description="number of the item in the index")
    kind: Kind
    distance: int = Field(description="Hamming distance to the question, in bits")
    caption: str
    thumbnail: str | None = Field(description="where its picture is, if it has one")
    metadata: dict[str, Any]


class Answer(BaseModel):
    """Hits of one question, the nearest first."""

    hits: list[FoundItem]


class Answers(BaseModel):
    """Hits of several questions, in their order."""

    answers: list[Answer]


class Health(BaseModel):
    """What is served."""

    status: Literal["ok"]
    images: int
    texts: int
    bits: int
    model: str
    engine: str


class Service:
    """An index and its model, asked by one request at a time; follows an index that is changed meanwhile.

    Args:
        searcher: The index with its model.
        config: Limits.
    """

    def __init__(self, searcher: Searcher, config: ServeConfig) -> None:
        self.config = config
        self._searcher = searcher
        self._lock = threading.Lock()
        self._state = self._stamp()

    def ask(self, question: Callable[[Searcher], list[list[Hit]]]) -> list[Answer]:
        """Answers of a question put to the searcher."""
        with self._lock:
            hits = question(self._fresh())
        return [Answer(hits=[_found(hit) for hit in row]) for row in hits]

    def item(self, number: int) -> Hit:
        """An item.

        Raises:
            KeyError: If there is no such item.
        """
        with self._lock:
            return self._fresh().index.hit(number)

    def health(self) -> Health:
        """What is served."""
        with self._lock:
            index = self._fresh().index
            return Health(
                status="ok",
                images=index.count(("image",)),
                texts=index.count(("text",)),
                bits=index.header.bits,
                model=index.header.model.partition(" of ")[0].rstrip(","),
                engine=index.header.engine,
            )

    def close(self) -> None:
        """Closes the index."""
        self._searcher.close()

    def hits_wanted(self, k: int | None) -> int | None:
        """How many hits a question gets.

        Raises:
            UserError: If it asks for too many.
        """
        if k is not None and k > self.config.most_hits:
            raise UserError(f"k is {k}, and at most {self.config.most_hits} hits are given; ask for fewer")
        return k

    def _fresh(self) -> Searcher:
        """The searcher, with the index opened again where another process has changed it."""
        state = self._stamp()
        if state != self._state:
            old = self._searcher.index
            self._searcher = Searcher(Index.open(old.folder), self._searcher.encoder)
            self._state = state
            old.close()
        return self._searcher

    def _stamp(self) -> tuple[int, int] | None:
        """State of the file that an embedded engine writes last; engines on a server are always up to date."""
        try:
            found = (self._searcher.index.folder / CODES).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino


def create_app(service: Service) -> FastAPI:
    """The service as an ASGI application.

    Args:
        service: What answers.
    """
    config = service.config
    # FastAPI's own documentation pages load scripts from other hosts; /openapi.json says the same
    app = FastAPI(title="Cross-modal search", version="1", docs_url=None, redoc_url=None)
    # A foreign page may reach this machine under a name of its own (DNS rebinding), so here only ours are answered
    app.add_middleware(_Guard, upload_bytes=config.upload_bytes, hosts=LOCAL if config.host in LOCAL else ())
    _add_errors(app)
    _add_page(app)

    @app.get("/api/health")
    def health() -> Health:
        """Whether the service answers, and what it serves."""
        return service.health()

    @app.post("/api/search")
    def search(question: TextQuestion) -> Answer:
        """Hits of a text."""
        k = service.hits_wanted(question.k)
        return service.ask(lambda searcher: searcher.by_texts([question.text], k, _kinds(question.find)))[0]

    @app.post("/api/search/batch")
    def search_batch(questions: TextQuestions) -> Answers:
        """Hits of several texts."""
        if len(questions.texts) > config.most_questions:
            raise UserError(f"{len(questions.texts)} questions, and at most {config.most_questions} are answered")
        k = service.hits_wanted(questions.k)
        kinds = _kinds(questions.find)
        return Answers(answers=service.ask(lambda searcher: searcher.by_texts(questions.texts, k, kinds)))

    @app.post("/api/search/picture")
    def search_picture(
        file: Annotated[UploadFile, File(description="a picture")],
        k: Annotated[int | None, Query(ge=1)] = None,
        find: Find | None = None,
    ) -> Answer:
        """Hits of an uploaded picture."""
        wanted = service.hits_wanted(k)
        picture = read_picture(file.file, config.upload_pixels)
        return service.ask(lambda searcher: searcher.by_pictures([picture], wanted, _kinds(find)))[0]

    @app.get("/api/items/{number}")
    def item(number: int) -> FoundItem:
        """One item of the index."""
        return _found(_existing(lambda: service.item(number), number))

    @app.get("/api/items/{number}/similar")
    def similar(number: int, k: Annotated[int | None, Query(ge=1)] = None, find: Find | None = None) -> Answer:
        """More like an item: hits of its own code, without itself."""
        wanted = service.hits_wanted(k)
        ask = service.ask
        return _existing(lambda: ask(lambda searcher: [searcher.like_item(number, wanted, _kinds(find))])[0], number)

    @app.get("/api/items/{number}/thumbnail", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
    def thumbnail(number: int) -> Response:
        """The picture of an item, small."""
        path = _existing(lambda: service.item(number), number).metadata.get("path")
        if not isinstance(path, str):
            raise HTTPException(404, f"item {number} has no picture")
        try:
            content = thumbnail_of(path, config.thumbnail)
        except UserError:
            raise HTTPException(404, f"the picture of item {number} cannot be read any more") from None
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    return app


def thumbnail_of(path: str, side: int) -> bytes:
    """A picture file as a small JPEG, turned as its camera says, on white where it is transparent.

    Args:
        path: The file.
        side: Pixels of the longer side.

    Raises:
        UserError: If it cannot be read.
    """
    with opened(path, f"picture {path}", found="restore it", instead="index again") as picture:
        picture.draft("RGB", (side, side))  # of a JPEG only as much is decoded as is needed
        small = as_rgb(picture) if picture.mode.startswith("I") else ImageOps.exif_transpose(picture)
        small.thumbnail((side, side))
        if small.has_transparency_data:
            small = small.convert("RGBA")
            ground = Image.new("RGBA", small.size, "white")
            small = Image.alpha_composite(ground, small)
        out = io.BytesIO()
        small.convert("RGB").save(out, "JPEG", quality=85)
    return out.getvalue()


def _kinds(find: Find | None) -> tuple[Kind, ...] | None:
    return None if find is None else FINDS[find]


def _existing(ask: Callable[[], Any], number: int) -> Any:
    try:
        return ask()
    except (KeyError, OverflowError):
        raise HTTPException(404, f"there is no item {number}") from None


def _found(hit: Hit) -> FoundItem:
    data = hit.metadata
    name = Path(str(data.get("path") or data.get("name", ""))).name
    texts = data.get("texts")
    said = data.get("text") if hit.kind == "text" else texts[0] if isinstance(texts, list) and texts else None
    return FoundItem(
        id=hit.id,
        kind=hit.kind,
        distance=hit.distance,
        caption=str(said or name),
        thumbnail=f"/api/items/{hit.id}/thumbnail" if isinstance(data.get("path"), str) else None,
        metadata=data,
    )


def _add_page(app: FastAPI) -> None:
    for address, name in (("/", "page.html"), ("/page.css", "page.css"), ("/page.js", "page.js")):
        app.get(address, include_in_schema=False, response_class=FileResponse)(_sender(PAGE / name))
    app.get("/favicon.ico", include_in_schema=False, status_code=204, response_class=Response)(lambda: None)


def _sender(path: Path) -> Callable[[], str]:
    def send() -> str:
        return str(path)

    return send


def _add_errors(app: FastAPI) -> None:
    """Every error is `{"error": one line}`."""

    @app.exception_handler(AnyHTTPException)
    async def of_http(_: Request, error: AnyHTTPException) -> Response:
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def of_form(_: Request, error: RequestValidationError) -> Response:
        said = [f"{'.'.join(map(str, part['loc'][1:])) or 'the request'}: {part['msg']}" for part in error.errors()]
        return JSONResponse({"error": "; ".join(said)}, 422)

    @app.exception_handler(UserError)
    async def of_user(_: Request, error: UserError) -> Response:
        return JSONResponse({"error": str(error)}, 400)

    @app.exception_handler(Exception)
    async def of_defect(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse({"error": "the service failed; its log says how"}, 500, headers=HEADERS)


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class _Guard:
    """Bounds what a request may send and whom it may address, and puts security headers on every answer.

    Args:
        app: What answers.
        upload_bytes: Most bytes of a request.
        hosts: Names that a request may address; all where there are none.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], upload_bytes: int, hosts: Sequence[str]) -> None:
        self.app = app
        self.most = upload_bytes
        self.hosts = hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        too_large = AnyHTTPException(413, f"a request may have {self.most:,} bytes")
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.most:
                raise too_large
            return message

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = ((name.lower().encode(), value.encode()) for name, value in HEADERS.items())
                message["headers"] = [*message["headers"], *own]
            await send(message)

        async def refuse(status: int, why: str) -> None:
            await JSONResponse({"error": why}, status)(scope, receive, guarded)

        host = headers.get(b"host", b"").decode("latin-1").lower()
        declared = headers.get(b"content-length", b"0")
        if self.hosts and host.removeprefix("[").partition("]" if "[" in host else ":")[0] not in self.hosts:
            await refuse(400, f"this service answers at {self.hosts[0]}, not at {host!r}")
        elif declared.isdigit() and int(declared) > self.most:
            await refuse(413, too_large.detail)
        else:
            await self.app(scope, bounded, guarded)
