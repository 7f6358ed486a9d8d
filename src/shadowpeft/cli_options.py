"""Arguments and options that several verbs have, each described once."""

from pathlib import Path
from typing import Annotated

import typer

Adapter = Annotated[str, typer.Argument(help="adapter folder or hub name")]
Out = Annotated[str, typer.Argument(help="empty or absent folder")]
Base = Annotated[str | None, typer.Option(help="base, if not the one the adapter names")]
Device = Annotated[str | None, typer.Option(help="such as cpu or cuda:1; default: the accelerator there is, else the CPU")]
OtherWeights = Annotated[bool, typer.Option(help="accept a base with other weights")]
Data = Annotated[str | None, typer.Option(help="folder or file with the data; default: the hub (robot: generated)")]
RouterFile = Annotated[Path, typer.Option(help="file that `shadowpeft calibrate` wrote")]
