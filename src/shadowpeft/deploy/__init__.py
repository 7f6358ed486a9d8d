"""The shadow on its own: detached folders, ONNX and GGUF files, and other libraries' checkpoints."""

from shadowpeft.deploy.convert import convert
from shadowpeft.deploy.detach import write_detached

__all__ = ["convert", "write_detached"]
