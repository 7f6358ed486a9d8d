"""Edge, router and cloud as one system of processes, measured against the cloud alone."""

__all__: list[str] = []
