"""Say a lasting fault again at growing intervals, not each time it is met."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Complaints"]

# Seconds until the same words are said again the first time, doubled each time, at most.
_FIRST, _LONGEST = 60.0, 3600.0
# Words that were not met for so long are news again.
_FORGOTTEN = 60.0
# Words with numbers in them may be new each time; memory may not grow.
_MOST = 16


@dataclass
class _Said:
    due: float
    interval: float
    met: float


class Complaints:
    """What was said when. Two faults that take turns are each said once, too."""

    def __init__(self) -> None:
        """Nothing was said."""
        self._said: dict[str, _Said] = {}

    def due(self, words: str, now: float) -> bool:
        """Whether to say `words` at the time `now`, seconds; True counts as said."""
        said = self._said.get(words)
        if said is None or now - said.met > _FORGOTTEN:
            self._said.pop(words, None)
            if len(self._said) >= _MOST:
                del self._said[min(self._said, key=lambda each: self._said[each].met)]
            self._said[words] = _Said(now + _FIRST, _FIRST, now)
            return True
        said.met = now
        if now < said.due:
            return False
        said.interval = min(2 * said.interval, _LONGEST)
        said.due = now + said.interval
        return True
