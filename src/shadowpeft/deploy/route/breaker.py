"""Not asking a cloud that just failed several times."""

import time
from collections.abc import Callable


class CircuitBreaker:
    """Opens after failures in a row, and lets one trial through after a while. For one event loop; no lock.

    Args:
        max_failures: in a row, after which it opens.
        open_seconds: how long it stays open before a trial.
        clock: seconds, monotonic.
    """

    def __init__(
        self, *, max_failures: int = 5, open_seconds: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_failures, self._open_seconds, self._clock = max_failures, open_seconds, clock
        self._failures = 0
        self._opened: float | None = None
        self._trial_runs = False

    @property
    def is_open(self) -> bool:
        return self._opened is not None

    def allows(self) -> bool:
        """Whether a call may be made now. Who gets True must report ``succeeded``, ``failed`` or ``released``."""
        if self._opened is None:
            return True
        if self._trial_runs or self._clock() - self._opened < self._open_seconds:
            return False
        self._trial_runs = True
        return True

    def succeeded(self) -> None:
        self._failures, self._opened, self._trial_runs = 0, None, False

    def failed(self) -> None:
        self._failures += 1
        if self._trial_runs or self._failures >= self._max_failures:
            self._opened = self._clock()
        self._trial_runs = False

    def released(self) -> None:
        """The call ended without saying anything about the cloud, as when the client left."""
        self._trial_runs = False
