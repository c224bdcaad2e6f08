"""Questions to a server of a model, by HTTP: in batches, several at once, asked again while it is busy or broken.

Dimensions: B texts, N passages of a query, D width.
"""

from __future__ import annotations

import base64
import json
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

import numpy as np

from lead_ds.errors import InputError, RunError

_LONGEST = 60.0  # seconds between two tries, unless the server says more
_BUSY = (408, 425, 429, 500, 502, 503, 504, 529)
_PLURAL = {"vllm": "data", "cohere": "results", "jina": "results"}

Questions = Sequence[tuple[str, ...]]  # a text, or a query and its passage


class _Again(Exception):
    """What a try failed of, and the seconds to wait that the server named."""

    def __init__(self, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.after = after


class Client:
    """One server. Its key is read from the environment when it is first asked, and is in nothing that is printed or kept."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self._stopped = threading.Event()

    def key(self) -> str:
        """The key; "" where none is named. Raises InputError where the variable is not set."""
        name = self.settings.key_variable
        if name is None:
            return ""
        found = os.environ.get(name, "").strip()
        if not found:
            raise InputError("teacher.key_variable", f"{name} is not set", "export it with the server's key")
        if not found.isascii() or not found.isprintable():  # the HTTP library would refuse it, and repeat it
            raise InputError("teacher.key_variable", f"{name} holds what no header can carry", "export the key alone")
        return found

    def ask(self, questions: Questions, keep: Callable[[Questions, np.ndarray], None]) -> None:
        """Have every question answered: vectors [B, D] or scores [N], float32, given to `keep` in this thread as they come.

        Raises InputError where the server refuses what is asked, RunError where it gives no good answer in `tries` tries.
        """
        requests, key = list(self._requests(questions)), self.key()
        library = _library()
        limits = library.Limits(max_connections=self.settings.concurrent)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._stopped.clear()
        with (
            library.Client(headers=headers, timeout=self.settings.timeout, limits=limits) as http,
            ThreadPoolExecutor(self.settings.concurrent) as pool,
        ):
            futures = {pool.submit(self._answer, http, some, key): some for some in requests}
            left = set(futures)
            try:
                while left:
                    done, left = wait(left, return_when=FIRST_EXCEPTION, timeout=0.2)
                    # What came is kept before what failed is raised.
                    for future in sorted(done, key=lambda one: one.exception() is not None):
                        keep(futures[future], future.result())
            except BaseException:
                self._stopped.set()
                pool.shutdown(cancel_futures=True)  # what was under way is waited for, and kept
                for future in left:
                    if not future.cancelled() and future.exception() is None:
                        keep(futures[future], future.result())
                raise

    def _requests(self, questions: Questions) -> Iterator[Questions]:
        """Texts, or passages of one query, that are asked for together."""
        size = self.settings.request_size
        if self.settings.api == "embeddings":
            parts = [list(questions)]
        else:
            by_query: dict[str, list[tuple[str, ...]]] = {}
            for question in questions:
                by_query.setdefault(question[0], []).append(question)
            parts = list(by_query.values())
        for part in parts:
            for first in range(0, len(part), size):
                yield part[first : first + size]

    def _answer(self, http: Any, questions: Questions, key: str) -> np.ndarray:
        for tried in range(self.settings.tries):
            try:
                return self._once(http, questions, key)
            except _Again as error:
                what, after = str(error), error.after
            if tried + 1 < self.settings.tries:
                pause = min(_LONGEST, self.settings.pause * 2**tried) * random.uniform(0.5, 1.0)
                pause = max(pause, after or 0.0)
                if pause > 5:
                    print(f"{self.settings.url}: {what}; asked again in {pause:.0f} s", file=sys.stderr, flush=True)
                if self._stopped.wait(pause):
                    break
        raise RunError(
            self.settings.url,
            f"no good answer in {self.settings.tries} tries: {what}",
            "answers until now are kept: start again when it is well, or raise teacher.tries",
        )

    def _once(self, http: Any, questions: Questions, key: str) -> np.ndarray:
        library = _library()
        try:
            body = json.dumps(body_of(self.settings, questions))  # in ASCII: half a character is sent as JSON has it
            answer = http.post(self.settings.url, content=body, headers={"Content-Type": "application/json"})
        except (library.InvalidURL, library.UnsupportedProtocol) as error:
            raise InputError("teacher.url", f"{self.settings.url}: {error}", "give a whole http:// address") from None
        except (library.HTTPError, OSError) as error:
            raise _Again(_safe(f"{type(error).__name__}: {error}", key)) from None
        status = answer.status_code
        if status in _BUSY:
            raise _Again(f"status {status}", _retry_after(answer.headers.get("Retry-After")))
        if status != 200:
            said = answer.headers.get("Location", "") if 300 <= status < 400 else answer.text
            what = f"answers with status {status}: {_safe(said, key)}"
            raise InputError(self.settings.url, what, _remedy(status))
        try:
            tree = answer.json()
        except (ValueError, RecursionError):
            raise _Again("an answer that is not JSON") from None
        if isinstance(tree, dict) and tree.get("error"):
            raise _Again(_safe(f"an error in its answer: {tree['error']}", key))
        try:
            found = read_answer(self.settings.api, tree, len(questions))
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            said = str(error) if type(error) is ValueError else f"another form: {type(error).__name__} {error}"
            raise _Again(_safe(f"an answer of {said}", key)) from None
        return found


def body_of(settings: Any, questions: Questions) -> dict[str, Any]:
    """The JSON of a request: OpenAI's embeddings, TEI's, Cohere's and Jina's rerank, vLLM's score."""
    named = {} if settings.model is None else {"model": settings.model}
    last = [question[-1] for question in questions]
    if settings.api == "embeddings":
        return {**named, "input": last, "encoding_format": "float", **settings.extra}
    query = questions[0][0]
    if settings.api == "tei":
        return {"query": query, "texts": last, "raw_scores": True, **settings.extra}
    if settings.api == "vllm":
        return {**named, "text_1": query, "text_2": last, **settings.extra}
    return {**named, "query": query, "documents": last, "top_n": len(last), **settings.extra}


def read_answer(api: str, tree: Any, count: int) -> np.ndarray:
    """Vectors [count, D] or scores [count], float32, in the order of the questions.

    A vector may be text: base64 of little-endian float32, as OpenAI has it.
    Raises ValueError for another count, an index that is twice there or none, widths that differ, numbers that are not
    finite; KeyError, TypeError, IndexError or OverflowError for another form.
    """
    rows = tree if api == "tei" else tree[_PLURAL.get(api, "data")]
    if len(rows) != count:
        raise ValueError(f"{len(rows)} results for {count} questions")
    field = "embedding" if api == "embeddings" else "relevance_score" if api in ("cohere", "jina") else "score"
    found: list[Any] = [None] * count
    for row in rows:
        place = row["index"]
        if type(place) is not int or not 0 <= place < count or found[place] is not None:
            raise ValueError(f"index {place!r} of {count}")
        found[place] = _decoded(row[field]) if isinstance(row[field], str) else row[field]
    if api == "embeddings" and len({len(vector) for vector in found}) > 1:
        raise ValueError("vectors of several widths")
    with np.errstate(over="ignore"):
        array = np.asarray(found, np.float64).astype(np.float32)
    if array.ndim != (2 if api == "embeddings" else 1) or not array.size:
        raise ValueError(f"shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("numbers that are not finite")
    return array


def _decoded(vector: str) -> list[float]:
    return np.frombuffer(base64.b64decode(vector, validate=True), "<f4").tolist()


def _retry_after(said: str | None) -> float | None:
    """Seconds that a server's Retry-After names: a number, or a date."""
    if said is None:
        return None
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(said).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _remedy(status: int) -> str:
    if 300 <= status < 400:
        return "the key would go where it points, so it is not followed: set teacher.url to that if you trust it"
    if status in (401, 403):
        return "check the key in the variable that teacher.key_variable names"
    if status in (404, 405):
        return "teacher.url is the whole address, such as http://host:8000/v1/embeddings"
    return "see its message; shorter texts, teacher.extra or a smaller teacher.request_size may help"


def _safe(text: str, key: str) -> str:
    """A message in one short line without the key, should a server repeat it: also as JSON or an address has it."""
    for form in {key, json.dumps(key)[1:-1], quote(key, safe="")} - {""}:
        text = text.replace(form, "***")
    return " ".join(text.split())[:200]


def _library() -> Any:
    """The HTTP library that huggingface_hub brings."""
    try:
        import httpx2

        return httpx2
    except ImportError:
        import httpx

        return httpx
