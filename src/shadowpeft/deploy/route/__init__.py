"""Deciding on the device whether its answer will do or the cloud is asked."""

__all__: list[str] = []
