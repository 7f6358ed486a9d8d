"""Deciding on the device whether its answer will do or the cloud is asked."""

from shadowpeft.deploy.route.artefact import Router, check_choices, fit_router, load_router, save_router
from shadowpeft.deploy.route.breaker import CircuitBreaker
from shadowpeft.deploy.route.calibrate import check_routable, observe, skills_of
from shadowpeft.deploy.route.cloud import Cloud, CloudSettings
from shadowpeft.deploy.route.operating import Target
from shadowpeft.deploy.route.service import EDGE_NAME, EdgeService

__all__ = [
    "EDGE_NAME",
    "CircuitBreaker",
    "Cloud",
    "CloudSettings",
    "EdgeService",
    "Router",
    "Target",
    "check_choices",
    "check_routable",
    "fit_router",
    "load_router",
    "observe",
    "save_router",
    "skills_of",
]
