"""Not asking a cloud that just failed several times."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Permit:
    """One call that may be made; handed back with its outcome. ``is_trial``: the one that is let through an open breaker."""

    is_trial: bool


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

    def admit(self) -> Permit | None:
        """A permit, or None if no call may be made now. It must come back by ``succeeded``, ``failed`` or ``released``."""
        if self._opened is None:
            return Permit(is_trial=False)
        if self._trial_runs or self._clock() - self._opened < self._open_seconds:
            return None
        self._trial_runs = True
        return Permit(is_trial=True)

    def succeeded(self, permit: Permit) -> None:
        self._end(permit)
        self._failures, self._opened = 0, None

    def failed(self, permit: Permit) -> None:
        """Opens on a failed trial and on the last failure allowed; calls from before it opened do not make it stay open."""
        self._end(permit)
        self._failures += 1
        if permit.is_trial or (self._opened is None and self._failures >= self._max_failures):
            self._opened = self._clock()

    def released(self, permit: Permit) -> None:
        """The call ended without saying anything about the cloud, as when the client left."""
        self._end(permit)

    def _end(self, permit: Permit) -> None:
        if permit.is_trial:  # an older call that ends meanwhile must not let a second trial through
            self._trial_runs = False
