"""Ends an answer at a stop string, also where the string arrives in pieces. Floor 3; pure text."""

from collections.abc import Sequence


class StopStrings:
    """Holds back the longest end of the text that may still become a stop string.

    The stop string that is complete first ends the text; of several complete at once, the longest.
    So the result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is safe to show, and whether a stop string has ended the answer."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [(begin + len(s), begin) for s in self._stops if (begin := text.find(s)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        held = self._num_held(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """What was held back, when the answer ends in another way."""
        text, self._held = self._held, ""
        return text

    def _num_held(self, text: str) -> int:
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for count in range(longest, 0, -1):
            end = text[-count:]
            if any(stop.startswith(end) for stop in self._stops):
                return count
        return 0
