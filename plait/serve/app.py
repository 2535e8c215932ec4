"""The HTTP side: OpenAI's paths over a `Batch`, answers whole or as they come (server-sent events)."""

import asyncio
import contextlib
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from plait.data import Tokenizer
from plait.engine.text import StoppedText
from plait.serve.asked import ChatCompletion, Completion, Form, read
from plait.serve.batching import Batch, Closed, Request

LARGEST = 64 * 2**20  # bytes of a request's body


class Choice:
    """One continuation on its way: tokens come from the batch's thread, text goes to the client."""

    def __init__(self, batch: Batch, tokenizer: Tokenizer, asked: Form, ids: list[int], most: int, seed: int):
        loop, self._told = asyncio.get_running_loop(), asyncio.Queue[int | None | Exception]()

        def tell(what: int | None | Exception) -> None:
            loop.call_soon_threadsafe(self._told.put_nowait, what)

        self.request = Request(ids, most, tell, asked.sampling(), seed, asked.ends(tokenizer))
        self._batch, self._text, self.reason = batch, StoppedText(tokenizer.stream(after=ids), asked.stops()), "stop"

    async def pieces(self) -> AsyncIterator[str]:
        """Text as soon as it is certain; `reason` afterwards. The request is in the batch from the first piece asked for until
        nobody asks for more."""
        self._batch.submit(self.request)
        try:
            while not self._text.ended:
                told = await self._told.get()
                if isinstance(told, Exception):
                    raise told
                if told is None:
                    self.reason = "length" if len(self.request.tokens) == self.request.max_tokens else "stop"
                    break
                if piece := self._text.push(told):
                    yield piece
            if piece := self._text.finish():
                yield piece
        finally:
            self.cancel()

    def cancel(self) -> None:
        self._batch.cancel(self.request)


class Service:
    """name: what the model is called. most: tokens of an answer where the request does not say."""

    def __init__(self, batch: Batch, tokenizer: Tokenizer, name: str, most: int = 1024):
        self.batch, self.tokenizer, self.name, self.most = batch, tokenizer, name, most
        self.created = int(time.time())

    def app(self) -> Starlette:
        """The batch's thread runs as long as the application does."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            thread = threading.Thread(target=self.batch.run, name="batch")
            thread.start()
            try:
                yield
            finally:
                self.batch.close()
                await asyncio.to_thread(thread.join)

        routes = [
            Route("/v1/models", self.models),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/health", self.health),
        ]
        handlers = {HTTPException: _not_there, ValueError: _wrong, Closed: _closed, RuntimeError: _failed}
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)  # type: ignore[arg-type]  # one class each

    async def models(self, _: HTTPRequest) -> Response:
        one = {"id": self.name, "object": "model", "created": self.created, "owned_by": "plait"}
        if self.batch.length is not None:
            one["max_model_len"] = self.batch.length
        return JSONResponse({"object": "list", "data": [one]})

    async def health(self, _: HTTPRequest) -> Response:
        state = {"rows": self.batch.pool.rows, "live": len(self.batch.live), "waiting": len(self.batch.waiting)}
        return JSONResponse({"status": "ok"} | state)

    async def completions(self, http: HTTPRequest) -> Response:
        return await self._answer(http, Completion)

    async def chat(self, http: HTTPRequest) -> Response:
        return await self._answer(http, ChatCompletion)

    async def _answer(self, http: HTTPRequest, kind: type[Form]) -> Response:
        asked = read(await _json(http), kind)
        if asked.model not in (None, "", self.name):
            raise HTTPException(404, f"no model {asked.model!r} here; there is {self.name!r}")
        prompts = await asyncio.to_thread(asked.prompts, self.tokenizer)
        most = [self._most(asked, ids) for ids in prompts]
        for ids, count in zip(prompts, most, strict=True):  # all, before any of them is begun
            self.batch.check(ids, count)
        seed = int(torch.randint(2**62, (), device="cpu")) if asked.seed is None else asked.seed
        choices = [
            Choice(self.batch, self.tokenizer, asked, ids, count, seed + again)
            for ids, count in zip(prompts, most, strict=True)
            for again in range(asked.n)
        ]
        head = {"id": f"{kind.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if asked.stream:
            events = self._events(choices, asked, head)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return await self._whole(http, choices, asked, head)

    def _most(self, asked: Form, ids: list[int]) -> int:
        """Where nothing is said, no more than there is room for."""
        default = self.most if self.batch.length is None else min(self.most, self.batch.length - len(ids))
        return asked.most(max(1, default))

    async def _whole(self, http: HTTPRequest, choices: list[Choice], asked: Form, head: dict[str, Any]) -> Response:
        async def text(choice: Choice) -> str:
            return "".join([piece async for piece in choice.pieces()])

        texts = asyncio.gather(*map(text, choices))
        gone = asyncio.ensure_future(_gone(http))
        try:
            await asyncio.wait([texts, gone], return_when=asyncio.FIRST_COMPLETED)
            if not texts.done():
                return Response(status_code=499)  # nobody reads it
            found = [
                {"index": i, **asked.whole(text), "logprobs": None, "finish_reason": choice.reason}
                for i, (text, choice) in enumerate(zip(texts.result(), choices, strict=True))
            ]
            return JSONResponse(head | {"object": asked.whole_name, "choices": found, "usage": usage(choices)})
        finally:
            gone.cancel()
            texts.cancel()
            for choice in choices:
                choice.cancel()

    async def _events(self, choices: list[Choice], asked: Form, head: dict[str, Any]) -> AsyncIterator[str]:
        head = head | {"object": asked.event_name}

        def event(**more: Any) -> str:
            return f"data: {json.dumps(head | more, ensure_ascii=False)}\n\n"

        def part(index: int, delta: dict[str, Any], reason: str | None) -> str:
            return event(choices=[{"index": index, **delta, "logprobs": None, "finish_reason": reason}])

        pieces = asyncio.Queue[tuple[int, str | None | Exception]]()

        async def follow(index: int, choice: Choice) -> None:
            try:
                async for piece in choice.pieces():
                    pieces.put_nowait((index, piece))
                pieces.put_nowait((index, None))
            except (ValueError, RuntimeError) as error:
                pieces.put_nowait((index, error))

        tasks = [asyncio.ensure_future(follow(*each)) for each in enumerate(choices)]
        begun: set[int] = set()
        left = len(choices)
        try:
            while left:
                index, piece = await pieces.get()
                if isinstance(piece, Exception):
                    yield f"data: {json.dumps(_error(str(piece), 'server_error'))}\n\n"
                    return
                if piece is not None or index not in begun:
                    yield part(index, asked.piece(piece or "", index not in begun), None)
                    begun.add(index)
                if piece is None:
                    yield part(index, asked.piece("", False), choices[index].reason)
                    left -= 1
            if asked.usage_wanted:
                yield event(choices=[], usage=usage(choices))
            yield "data: [DONE]\n\n"
        finally:
            for task in tasks:
                task.cancel()
            for choice in choices:
                choice.cancel()


def usage(choices: list[Choice]) -> dict[str, Any]:
    """A prompt counts once, however many answers it has. cached_tokens: what an earlier request's state had read."""
    prompts = {id(choice.request.ids): choice.request for choice in choices}
    read = sum(len(request.ids) for request in prompts.values())
    written = sum(len(choice.request.tokens) for choice in choices)
    cached = sum(request.known for request in prompts.values())
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


async def _json(http: HTTPRequest) -> Any:
    body = bytearray()
    async for some in http.stream():
        body += some
        if len(body) > LARGEST:
            raise HTTPException(413, f"the request is larger than {LARGEST // 2**20} MiB")
    try:
        return json.loads(body)
    except ValueError as error:
        raise ValueError(f"the body is no JSON ({error})") from None


async def _gone(http: HTTPRequest) -> None:
    """Returns when the client has hung up."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _error(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": " ".join(message.split()), "type": kind, "param": None, "code": None}}


async def _wrong(_: HTTPRequest, error: Exception) -> Response:
    return JSONResponse(_error(str(error), "invalid_request_error"), 400)


async def _closed(_: HTTPRequest, error: Exception) -> Response:
    return JSONResponse(_error(str(error), "server_error"), 503)


async def _failed(_: HTTPRequest, error: Exception) -> Response:
    return JSONResponse(_error(str(error), "server_error"), 500)


async def _not_there(http: HTTPRequest, error: Any) -> Response:
    message = (
        error.detail if error.detail != "Not Found" else f"{http.url.path}: no such path; expected /v1/chat/completions"
    )
    return JSONResponse(_error(message, "invalid_request_error"), error.status_code)
