"""Shadows at work: detached folders, ONNX and GGUF files, other libraries' checkpoints, servers and routers."""

from shadowpeft.deploy.convert import convert_checkpoint
from shadowpeft.deploy.detach import write_detached
from shadowpeft.deploy.gguf import write_gguf
from shadowpeft.deploy.onnx import write_onnx
from shadowpeft.deploy.onnx_model import OnnxModel

__all__ = ["OnnxModel", "convert_checkpoint", "write_detached", "write_gguf", "write_onnx"]
