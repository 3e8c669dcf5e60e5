"""What the contract suite needs to cut connections: the client's connections, as the embedded runtime shows its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hutch.sdk.remote_box import RemoteBox


class Line:
    """All connections of a client to the executions of a box."""

    def __init__(self, box: RemoteBox) -> None:
        self._box = box

    @property
    def _watchers(self) -> list[str]:
        return [execution.id for execution in self._box._executions]

    def close(self) -> None:
        """Cut them: without a word, and with what is on its way lost."""
        for execution in list(self._box._executions):
            link = execution._channel._link  # type: ignore[attr-defined]
            if link._transport is not None:
                link._transport.abort()


class Lines:
    """In the place of `hutch.runtime.channels.Channels`."""

    def __init__(self, box: RemoteBox) -> None:
        self._box = box

    def find(self, box_id: str) -> Line | None:
        """The line, if there is anything to cut."""
        open_ones = [execution for execution in self._box._executions if not execution._channel.closed]
        return Line(self._box) if box_id == self._box.id and open_ones else None
