"""Running trained shadows: servers, routers and whole systems."""
