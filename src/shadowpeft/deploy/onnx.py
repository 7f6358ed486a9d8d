"""ONNX files of an ordinary model: one graph with a key/value cache, for prompt and decoding alike; int8 on request."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from shadowpeft.deploy.onnx_model import OnnxModel
from shadowpeft.deploy.packages import ExportError, check_generates, need
from shadowpeft.errors import first_line
from shadowpeft.files import new_folder, write_files
from shadowpeft.model.cache import CACHE

ONNX_FILE = "model.onnx"
# Protobuf ends at 2 GB, so larger weights go into a file beside the graph.
MAX_BYTES_IN_GRAPH = 1_500_000_000
NUM_PAST, NUM_NEW = 3, 5
# What torch.export and the ONNX converter raise for a model they cannot follow.
_EXPORT_FAILURES = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError)
MAX_DIFFERENCE = 1e-3


def write_onnx(
    model: PreTrainedModel,
    folder: Path | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    int8: bool = False,
) -> None:
    """Writes ``model.onnx`` with ``config.json``, generation config and tokenizer.

    The graph takes ``input_ids``, ``attention_mask``, ``position_ids`` and ``past_key_values.N.key`` / ``.value``
    (length 0 for a prompt), and gives ``logits`` and ``present.N.key`` / ``.value``. With ``int8`` the weights of
    matrix products and tables are stored as int8, activations are quantised as they come (onnxruntime's dynamic
    scheme).

    Raises:
        ExportError: this architecture cannot be exported, or onnxruntime computes other logits than torch.
        MissingPackageError: onnx, onnxscript or onnxruntime is not installed.
        ConfigError: the folder holds something.
    """
    check_generates(model, what="ONNX export")
    need("onnx", what="ONNX export")
    need("onnxscript", what="ONNX export")
    need("onnxruntime", what="ONNX export")
    target = new_folder(folder)
    # In float32, and on a copy: tracing swaps kernels, and the weights may be the base's own.
    model = copy.deepcopy(model).float().cpu().eval()
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / ONNX_FILE
        _save(_traced(model), model, path)
        check_onnx(path, model)

        def write(staging: Path) -> None:
            if int8:
                quantise(path, staging / ONNX_FILE)
            else:
                for file in Path(work).iterdir():
                    (staging / file.name).write_bytes(file.read_bytes())
            model.config.save_pretrained(staging)
            model.generation_config.save_pretrained(staging)
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)

        write_files(target, write)


def _traced(model: PreTrainedModel) -> Any:
    try:
        from transformers.exporters.configs import OnnxConfig
        from transformers.exporters.exporter_onnx import OnnxExporter
    except ImportError as error:
        raise ExportError("ONNX export needs transformers.exporters: upgrade transformers (5.23 has it)") from error
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.set_experts_implementation("batched_mm")  # the other kernels choose experts by data
    try:
        return OnnxExporter().export(model, _sample_inputs(model), config=OnnxConfig(dynamic=True)).program
    except _EXPORT_FAILURES as error:
        raise ExportError(
            f"{type(model).__name__} could not be exported to ONNX ({type(error).__name__}: {first_line(error)[:200]}); the "
            "detached folder still runs in transformers"
        ) from error


@torch.no_grad()
def _sample_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """A batch of two with some tokens in the cache and some new ones: no dimension is 0 or 1, so none gets fixed."""
    length = NUM_PAST + NUM_NEW
    ids = torch.arange(2 * length).reshape(2, length) % model.config.vocab_size
    # Without the config, so that layers with a sliding window keep all keys, and the mask alone makes the window.
    cache = DynamicCache()
    model(input_ids=ids[:, :NUM_PAST], use_cache=True, **{CACHE: cache})
    return {
        "input_ids": ids[:, NUM_PAST:],
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(NUM_PAST, length).expand(2, -1).contiguous(),
        CACHE: cache,
        "use_cache": True,
    }


def _save(program: Any, model: PreTrainedModel, path: Path) -> None:
    onnx_ir = need("onnx_ir", what="ONNX export")
    graph = program.graph
    for value in (*graph.inputs, *graph.outputs):
        value.name = _short_name(value.name)
    # The exporter notes the Python stack of every node: paths of this machine, and most of a small file's size.
    for part in (program, graph, *program.functions.values(), *graph.all_nodes()):
        part.metadata_props.clear()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    external = {} if size < MAX_BYTES_IN_GRAPH else {"external_data": f"{ONNX_FILE}.data"}
    onnx_ir.save(program, str(path), **external)


def _short_name(name: str) -> str:
    """``input.past_key_values.layers.0.keys`` -> ``past_key_values.0.key``, as other exporters call it."""
    for prefix, short in ((f"input.{CACHE}.layers.", "past_key_values."),
                          (f"output.{CACHE}.layers.", "present.")):  # fmt: skip
        if name.startswith(prefix):
            index, part = name.removeprefix(prefix).split(".")
            return f"{short}{index}.{part.removesuffix('s')}"
    return name


def quantise(source: Path, target: Path) -> None:
    """Weights of matrix products and tables as int8, one scale a column."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    external = source.with_name(f"{ONNX_FILE}.data").exists()
    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=external,
    )


@torch.no_grad()
def check_onnx(path: Path, model: PreTrainedModel) -> None:
    """Compares the file with the model on a prompt, and on one more token behind it.

    Raises:
        ExportError: the logits differ by more than rounding.
    """
    runner = OnnxModel(path)
    length = NUM_PAST + NUM_NEW
    ids = (torch.arange(length)[None] * 7 + 3) % model.config.vocab_size
    expected = model(ids).logits
    prompt, cache = runner.run(ids[:, :-1].numpy(), None)
    last, _ = runner.run(ids[:, -1:].numpy(), cache)
    found = torch.cat([torch.from_numpy(prompt), torch.from_numpy(last)], dim=1)
    difference = (found - expected).abs().amax().item()
    if not difference <= MAX_DIFFERENCE * max(1.0, expected.abs().amax().item()):
        raise ExportError(
            f"onnxruntime's logits differ by {difference:.2e} from torch's for {type(model).__name__}; nothing was written"
        )
