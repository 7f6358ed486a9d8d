"""Edge, router and cloud as one system of processes, measured against the cloud alone."""

from shadowpeft.deploy.system_eval.report import write_report
from shadowpeft.deploy.system_eval.run import SystemConfig
from shadowpeft.deploy.system_eval.run import run as run_system

__all__ = ["SystemConfig", "run_system", "write_report"]
