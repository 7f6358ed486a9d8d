"""An OpenAI-compatible server whose requests are decoded together, whatever their adapters and modes."""

from shadowpeft.deploy.serve.app import create_app
from shadowpeft.deploy.serve.catalogue import Entry, catalogue
from shadowpeft.deploy.serve.errors import ApiError
from shadowpeft.deploy.serve.loading import Loaded, load_edge, load_served, task_or_none
from shadowpeft.deploy.serve.mixed import Path
from shadowpeft.deploy.serve.prompts import why_not_one_text
from shadowpeft.deploy.serve.run import check_free, run_app
from shadowpeft.deploy.serve.service import LocalService, Service, Settings

__all__ = [
    "ApiError",
    "Entry",
    "Loaded",
    "LocalService",
    "Path",
    "Service",
    "Settings",
    "catalogue",
    "check_free",
    "create_app",
    "load_edge",
    "load_served",
    "run_app",
    "task_or_none",
    "why_not_one_text",
]
