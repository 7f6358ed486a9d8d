"""Models for a server: one base with any number of adapters, or a detached shadow."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shadowpeft.deploy.serve.catalogue import is_usable_name
from shadowpeft.deploy.serve.exported import ExportedModel, Served, is_exported
from shadowpeft.deploy.serve.joining import new_cache
from shadowpeft.errors import AdapterError, ArchitectureError, ConfigError
from shadowpeft.model import ShadowModel
from shadowpeft.model.adapter_config import pinned_revision, read_config
from shadowpeft.model.architectures import architecture_of, decoder_of
from shadowpeft.model.bases import load_model, load_tokenizer
from shadowpeft.model.hub import find_folder
from shadowpeft.model.placement import device_named, moved
from shadowpeft.model.tensors import CONFIG_FILE
from shadowpeft.train.run import task_named
from shadowpeft.train.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with its tokenizer and the names of its adapters."""

    model: Served
    tokenizer: PreTrainedTokenizerBase
    adapters: list[str]


def parse_adapter(text: str) -> tuple[str, str]:
    """``NAME=FOLDER`` or ``FOLDER`` -> (name, folder). A folder called ``adapter`` is named after its parent.

    Raises:
        AdapterError: the name cannot be part of a model name.
    """
    name, is_named, folder = text.partition("=")
    if not is_named:
        path = Path(text)
        name, folder = (path.parent.name if path.name == "adapter" and path.parent.name else path.name), text
    if not is_usable_name(name):
        raise AdapterError(f"{name!r} cannot name an adapter; give one of letters, digits, - and _: NAME={folder}")
    return name, folder


def load_served(
    adapters: list[str],
    *,
    base: str | None = None,
    lora: str | None = None,
    allow_other_weights: bool = False,
    device: str | None = None,
) -> Loaded:
    """One base in memory, with every adapter.

    Args:
        adapters: ``NAME=FOLDER`` each. All must belong to one base.
        base: its name, if it is not the one that the first adapter names.
        lora: folder of a peft adapter that is merged into the base, for comparisons; no shadows then.
        device: where the model goes; None: the accelerator of this machine, else its CPU.

    Raises:
        ShadowPeftError: nothing to serve, a base that cannot be, an adapter that does not fit, or no such device.
    """
    place = device_named(device)
    named = [parse_adapter(text) for text in adapters]
    if len({name for name, _ in named}) < len(named):
        raise AdapterError(f"two adapters have one name in {', '.join(adapters)}; give NAME=FOLDER")
    if not named and base is None:
        raise ConfigError("nothing to serve: name adapters, or a base with --base")
    if named and lora is not None:
        raise ConfigError("a merged LoRA changes the base that shadows were trained on; serve them apart")
    folder = find_folder(named[0][1]) if named else None
    named_base = {"name_or_path": base} if base or folder is None else read_config(folder)["base"]
    base_name: Any = named_base["name_or_path"]
    model = _load_decodable(base_name, **pinned_revision(named_base))
    tokenizer = load_tokenizer(_tokenizer_place(folder, base_name))
    if lora is not None:
        model = _with_lora(model, lora)
    elif folder is not None:
        options: dict[str, Any] = {"allow_other_weights": allow_other_weights}
        shadow = ShadowModel.from_pretrained(folder, model, adapter_name=named[0][0], **options)
        for name, other in named[1:]:
            shadow.load_adapter(other, name, **options)
        model = shadow
    return Loaded(model=moved(model.eval(), place), tokenizer=tokenizer, adapters=[name for name, _ in named])


def load_edge(place: str, *, adapter: str | None = None, device: str | None = None) -> Loaded:
    """A detached shadow: a folder of ``shadowpeft export --format onnx`` (or ``onnx-int8``), which onnxruntime runs; one
    of ``shadowpeft detach``; or an adapter folder, detached here.

    The last needs the base in memory while loading and is meant for trying out.

    Args:
        device: as in :func:`load_served`; onnxruntime runs on the CPU, whatever it is.

    Raises:
        ShadowPeftError: nothing to load, a model that cannot be served, no tokenizer, no such device, or onnxruntime is not
            installed.
    """
    target = device_named(device)
    if is_exported(place):
        return Loaded(model=ExportedModel(place), tokenizer=load_tokenizer(place), adapters=[])
    if (Path(place) / CONFIG_FILE).is_file():
        loaded = load_served([f"{adapter or 'edge'}={place}"], device="cpu")
        assert isinstance(loaded.model, ShadowModel)
        return Loaded(model=moved(loaded.model.detach(), target), tokenizer=loaded.tokenizer, adapters=[])
    return Loaded(model=moved(_load_decodable(place).eval(), target), tokenizer=load_tokenizer(place), adapters=[])


def task_or_none(name: str | None) -> Task | None:
    """The task whose prompt wraps chat messages.

    Raises:
        ConfigError: unknown, or not answered by text.
    """
    if name is None:
        return None
    task = task_named(name)
    if task.kind != "generation":
        raise ConfigError(f"task {name!r} is answered by a {task.kind}, not by text; it cannot be served")
    return task


def _load_decodable(name: str, **options: Any) -> PreTrainedModel:
    """A model whose batches can be decoded; what would fail at every request is found here.

    Raises:
        ArchitectureError: it is no causal language model, of an unknown type, or keeps more than keys and values.
    """
    model = load_model(name, **options)
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise ArchitectureError(f"{name!r} is no causal language model, so it cannot answer")
    architecture_of(model.config)
    new_cache(decoder_of(model).config)
    return model


def _tokenizer_place(folder: Path | None, base: str) -> str:
    return str(folder) if folder is not None and (folder / "tokenizer_config.json").is_file() else base


def _with_lora(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError("serving a LoRA needs peft: pip install peft") from error
    return PeftModel.from_pretrained(model, folder).merge_and_unload()  # type: ignore[return-value]
