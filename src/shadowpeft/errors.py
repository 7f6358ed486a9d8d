"""Every error this package raises on purpose for bad input."""


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
