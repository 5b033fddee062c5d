"""Overdue replies: those that come after their round has ended are counted, and attributed to clients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flwr.app import Message

from strategies.request import PendingRequest, read_reply


class Overdue:
    """Requests of earlier rounds that nobody has answered, by the ids of their messages."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[int, PendingRequest]] = {}

    def note(self, server_round: int, requests: Iterable[PendingRequest]) -> None:
        """A round has ended without these, as far as they are unanswered."""
        for request in requests:
            if request.is_silent:
                self._waiting |= dict.fromkeys(request.message_ids() - {""}, (server_round, request))

    def answered(self, messages: Iterable[Message]) -> Iterator[tuple[int, PendingRequest]]:
        """Rounds and requests that these answer; what they say is in the requests.

        Errors of the network are no replies, and end the waiting.
        """
        for message in messages:
            found = self._waiting.pop(message.metadata.reply_to_message_id, None)
            if found is not None and not message.has_error():
                found[1].bytes_up = 0
                read_reply(found[1], message, trained=True)
                yield found
