"""Answers of the page: each is made in a thread of its own, whoever looks on, and told to all who do."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lit_llama.errors import UserError
from lit_llama.generate.chat.dialogue import Dialogue, Record
from lit_llama.generate.chat.session import Answer, sampling_of
from lit_llama.generate.chat.store import Store
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.engine.worker import EngineFailed
from lit_llama.generate.llm import LLM
from lit_llama.generate.serve.service import Service

_UNREAD = 10_000
Event = Mapping[str, Any]


class Listener:
    """Viewer of a conversation, in an event loop.

    Attributes:
        events: What was not told yet; None ends it.
    """

    def __init__(self) -> None:
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._loop, self._gone = asyncio.get_running_loop(), False

    def tell(self, event: Event | None) -> None:
        """Tell an event, from any thread; one who does not read is told no more, and has to begin anew."""
        if self._gone:
            return
        self._gone = self.events.qsize() > _UNREAD
        with contextlib.suppress(RuntimeError):  # its loop is closed
            self._loop.call_soon_threadsafe(self.events.put_nowait, None if self._gone else event)


@dataclass(eq=False)
class _Job:
    """An answer that is being made.

    Attributes:
        answer: Of which conversation's message.
        text: What was told of it.
    """

    answer: Answer
    text: str = ""


class Desk:
    """Conversations of a store, those who look at them, and the answers that are being made.

    Args:
        store: Where conversations are kept.
        service: Whose models answer, under its limits, and where that is counted.
    """

    def __init__(self, store: Store, service: Service) -> None:
        self.store, self.models, self._service = store, service.ready, service
        self._lock = threading.Lock()
        self._listeners: dict[str, set[Listener]] = {}
        self._jobs: dict[str, dict[int, _Job]] = {}

    # ---- those who look on

    def listen(self, id: str, listener: Listener) -> None:
        """Tell a listener what a conversation is, and from then on what becomes of it.

        Raises:
            NoConversation: There is none of this id.
        """
        with self._lock:
            listener.tell(self._whole(id))
            self._listeners.setdefault(id, set()).add(listener)

    def leave(self, id: str, listener: Listener) -> None:
        """Tell a listener nothing more."""
        with self._lock:
            own = self._listeners.get(id, set())
            own.discard(listener)
            if not own:
                self._listeners.pop(id, None)

    def tell(self, id: str, *records: Record) -> None:
        """Tell what was kept of a conversation."""
        with self._lock:
            self._tell(id, {"records": records})

    def _tell(self, id: str, event: Event) -> None:
        for listener in self._listeners.get(id, ()):
            listener.tell(event)

    def _whole(self, id: str) -> Event:
        dialogue = self.store.get(id).copy()
        live = self._jobs.get(id, {})
        for number, job in live.items():
            if number in dialogue.nodes:
                dialogue.nodes[number] = replace(dialogue.nodes[number], content=job.text)
        return {"reset": id, "records": list(dialogue.records()), "live": list(live)}

    # ---- changes

    def write(self, id: str, *records: Record) -> Dialogue:
        """Keep records of a conversation and tell them."""
        return self.change(id, lambda _: records)

    def change(self, id: str, make: Callable[[Dialogue], Iterable[Record]]) -> Dialogue:
        """Keep records that are made of the state of a conversation, and tell them."""
        told: list[Record] = []

        def noted(dialogue: Dialogue) -> list[Record]:
            told[:] = make(dialogue)
            return told

        dialogue = self.store.change(id, noted)
        self.tell(id, *told)
        return dialogue

    def delete(self, id: str) -> None:
        """Remove a conversation; its answers are stopped."""
        for job in list(self._jobs.get(id, {}).values()):
            job.answer.stop()
        self.store.delete(id)
        with self._lock:
            self._tell(id, {"deleted": id})

    # ---- answers

    def default(self, name: str, llm: LLM) -> Sampling:
        """Return the sampling of a model where a conversation does not say: at most half of its context is for an
        answer.
        """
        default = self.models().default(name)
        most = min(default.max_new_tokens, max(1, self.models().capacity(llm) // 2))
        return replace(default, max_new_tokens=most, min_new_tokens=min(default.min_new_tokens, most))

    def ask(self, id: str, *, text: str | None, parent: int, model: str | None, side: int) -> Answer:
        """Let a message be answered; the answer goes on whoever looks on.

        Args:
            id: Of the conversation.
            text: What the user says; None where `parent` is to be answered.
            parent: The message that it follows.
            model: Name of the model; None for that of the conversation.
            side: Of a comparison.

        Raises:
            UserError: It cannot be asked so; nothing is kept.
            ApiError: There is no such model, or as many answers are made and wait as may.
        """
        models = self.models()
        self._service.check_room(models, 1)
        settings = self.store.get(id).settings
        wanted = model if model is not None else settings.get("model")
        known = isinstance(wanted, str) and (model is not None or wanted in models.llms)
        name, llm = models.find(wanted if known else None)
        sampling = sampling_of(self.default(name, llm), settings)
        answer = Answer(
            self.store,
            id,
            llm,
            sampling,
            text=text,
            parent=parent,
            model=name,
            side=side,
            submit=models.worker.submit,
        )
        with self._lock:
            self._jobs.setdefault(id, {})[answer.id] = _Job(answer)
            self._tell(id, {"records": list(answer.records), "live": [answer.id]})
        self._service.note(1)
        threading.Thread(target=self._run, args=(id, answer), name=f"answer {answer.id}").start()
        return answer

    def stop(self, id: str, number: int) -> bool:
        """Stop an answer; False if it is not being made."""
        job = self._jobs.get(id, {}).get(number)
        if job is not None:
            job.answer.stop()
        return job is not None

    def _run(self, id: str, answer: Answer) -> None:
        job, error, first, late = self._jobs[id][answer.id], "", None, threading.Event()
        most = self._service.limits.max_seconds

        def end() -> None:
            late.set()
            answer.stop()

        timer = threading.Timer(most - answer.seconds, end)
        timer.daemon = True
        timer.start()
        try:
            for piece in answer:
                first = answer.seconds if first is None else first
                with self._lock:
                    job.text += piece
                    more = {"type": "text", "id": answer.id, "text": piece, "tokens": answer.tokens}
                    self._tell(id, {"records": [more]})
            if late.is_set() and answer.finish_reason == "abort":
                error = f"the answer took longer than {most:g} seconds; what there is of it is kept"
        except (UserError, EngineFailed) as failed:
            error = str(failed)
        finally:
            timer.cancel()
            self._service.note(-1)
            self._service.metrics.answered(
                prompt=len(answer.prompt.ids), made=answer.tokens, seconds=answer.seconds, first=first
            )
            with self._lock:
                self._jobs[id].pop(answer.id)
                if not self._jobs[id]:
                    del self._jobs[id]
                told = {"error": error, "id": answer.id} if error else {}
                self._tell(id, {"records": answer.records[-1:], "ended": answer.id, **told})
