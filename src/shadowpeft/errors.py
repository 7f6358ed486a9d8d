"""The errors that more than one folder raises on purpose; those of one module (``SaveError``, ``DetachError`` and others) are
beside what raises them. All are ``ShadowPeftError``."""


class ShadowPeftError(Exception):
    """Base of all errors of this package."""


class DataError(ShadowPeftError, ValueError):
    """A data set, file or row that cannot be used."""


class ConfigError(ShadowPeftError, ValueError):
    """A configuration value or key that is not valid."""


class ArchitectureError(ShadowPeftError, ValueError):
    """A base or shadow model this package cannot work with."""


class CheckpointError(ShadowPeftError, ValueError):
    """An adapter folder that is incomplete, damaged or made for another base."""


class AdapterError(ShadowPeftError, ValueError):
    """An adapter name that is unknown, taken or not usable here."""


def first_line(error: BaseException) -> str:
    """What another library's error says, as a part of one line of ours."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
