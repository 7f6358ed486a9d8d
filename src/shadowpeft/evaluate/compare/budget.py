"""Equal budgets: sizes for which all methods train the same number of parameters, counted without allocating any."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from shadowpeft.core import ShadowConfig
from shadowpeft.core.config import IMPLICIT_SIZES
from shadowpeft.errors import ArchitectureError, ConfigError
from shadowpeft.evaluate.compare.recipe import MethodSpec
from shadowpeft.model.architectures import architecture_of, blocks_of, decoder_of
from shadowpeft.model.backbones import empty_backbone
from shadowpeft.model.bases import location
from shadowpeft.model.build import assemble_network, build_network, set_trainable

SIZES = ("r", "update_hidden_size", "shadow_intermediate_size")
SMALLEST = {"r": 1, "update_hidden_size": 1, "shadow_intermediate_size": 8}


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A method's sizes on one base.

    Attributes:
        trainable: parameters that are trained, heads included.
        target: parameters that were asked for; None under an own budget.
        shadow: solved fields of ``ShadowConfig``.
        ranks: module -> rank, for LoRA and DoRA.
    """

    trainable: int
    target: int | None = None
    shadow: dict[str, int] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)


def base_config(path: str, inline: Mapping[str, Any] | None) -> PreTrainedConfig:
    """A base's config from the recipe, a folder or the hub.

    Raises:
        ArchitectureError: none of them has it.
    """
    if inline is not None:
        values = dict(inline)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    try:
        return AutoConfig.from_pretrained(location(path))
    except (OSError, ValueError) as error:
        raise ArchitectureError(
            f"there is no config of a base at {path!r}; pass --data-root, or give the recipe's base a `config:`"
        ) from error


def meta_base(config: PreTrainedConfig, num_labels: int | None) -> PreTrainedModel:
    """The base on the meta device: shapes without weights."""
    with torch.device("meta"):
        if num_labels is None:
            return AutoModelForCausalLM.from_config(config)
        config.num_labels = num_labels
        return AutoModelForSequenceClassification.from_config(config)


def solve(method: MethodSpec, base: PreTrainedModel, target: int | None, tolerance: float) -> Sized:
    """Sizes of ``method`` on ``base`` for ``target`` trained parameters.

    Args:
        base: on the meta device, see :func:`meta_base`.
        target: None leaves the sizes as the method gives them.

    Raises:
        ConfigError: the target cannot be met within ``tolerance``; the message says what can.
    """
    if method.kind == "none":
        return Sized(trainable=0)
    if method.kind == "probe":
        return Sized(trainable=_head(base))
    if method.kind == "full":
        return Sized(trainable=sum(p.numel() for p in base.parameters()))
    if method.budget == "own" or method.kind == "shadow-pretrained":
        target = None
    sized = _lora(method, base, target) if method.kind in ("lora", "dora") else _shadow(method, base, target)
    if target is not None and abs(sized.trainable - target) > tolerance * target:
        raise ConfigError(
            f"{method.kind} cannot train {target:,} parameters within {tolerance:.0%} on this base: the nearest is "
            f"{sized.trainable:,}. Choose another budget, or other modules, heads or layers for this method"
        )
    return sized


def target_of(parameters: int | None, reference: MethodSpec, base: PreTrainedModel, tolerance: float) -> int:
    """The number all methods aim at: ``parameters`` and the reference's heads, else the reference as it is."""
    if parameters is None:
        own = MethodSpec(**{**vars(reference), "budget": "own"})
        return solve(own, base, None, tolerance).trainable
    heads = 2 if reference.kind.startswith("shadow") else 1
    return parameters + heads * _head(base)


def _head(base: PreTrainedModel) -> int:
    score = getattr(base, "score", None)
    return 0 if score is None else sum(p.numel() for p in score.parameters())


# ---------------------------------------------------------------- LoRA and DoRA


def _lora(method: MethodSpec, base: PreTrainedModel, target: int | None) -> Sized:
    """One rank everywhere, and one more in as many modules as it takes; DoRA also trains a magnitude an output."""
    shapes = adapted_modules(base, method.targets)
    rest = _head(base) + (sum(width for _, width in shapes.values()) if method.kind == "dora" else 0)
    of_rank_one = {name: sum(shape) for name, shape in shapes.items()}
    whole = sum(of_rank_one.values())
    rank = method.r if target is None else max(1, (target - rest) // whole)
    ranks = dict.fromkeys(shapes, rank)
    if target is not None:
        left = target - rest - rank * whole
        for name in _spread(list(shapes)):
            if left >= of_rank_one[name] / 2:
                ranks[name] += 1
                left -= of_rank_one[name]
    return Sized(trainable=rest + sum(ranks[name] * of_rank_one[name] for name in shapes), target=target, ranks=ranks)


def adapted_modules(base: PreTrainedModel, targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Name -> (in, out) of every module of the blocks whose last name part is among ``targets``.

    Raises:
        ConfigError: there is none.
    """
    shapes = {}
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in targets and _is_matrix(module):
            weight: Any = module.weight
            rows, columns = weight.shape
            shapes[name] = (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)
    if not shapes:
        modules = blocks_of(decoder_of(base))[0].named_modules()
        there = sorted({name.rpartition(".")[2] for name, module in modules if _is_matrix(module)})
        raise ConfigError(f"the base has no module named {', '.join(targets)}; its blocks have {', '.join(there)}")
    return shapes


def _is_matrix(module: Any) -> bool:
    """Whether it multiplies by a matrix: ``nn.Linear``, and GPT-2's ``Conv1D``, which is none."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2


def _spread(names: list[str]) -> list[str]:
    """The names in an order whose every beginning is spread evenly over the depth (golden ratio)."""
    return [name for _, name in sorted(((index * 0.6180339887) % 1, name) for index, name in enumerate(names))]


# ---------------------------------------------------------------- shadow


def shadow_config(method: MethodSpec, *, is_classifier: bool, **changes: Any) -> ShadowConfig:
    """The method's configuration: preset, then its own fields, then ``changes`` (a ``preset`` among them wins)."""
    given = dict(method.shadow)
    preset = changes.pop("preset", given.pop("preset", "paper"))
    given.pop("preset", None)
    if changes.get("shadow_model", "implicit") != "implicit":  # a variant of another shadow, which brings its own sizes
        given, changes = ({k: v for k, v in each.items() if k not in IMPLICIT_SIZES} for each in (given, changes))
    return ShadowConfig.preset(preset, **{**given, **changes, "task_type": "SEQ_CLS" if is_classifier else "CAUSAL_LM"})


def count_shadow(config: ShadowConfig, base: PreTrainedModel, shape: Mapping[str, Any] | None = None) -> int:
    """Trained parameters of a network on ``base``; a pretrained shadow is counted by its config (``shape``) alone."""
    with torch.device("meta"):
        if config.is_implicit or config.shadow_model.startswith("base:"):
            network = build_network(base, config)
        else:
            shadow = base_config(config.shadow_model, shape)
            backbone = empty_backbone(base, shadow, keep_embeddings=not config.shares_embeddings)
            network = assemble_network(base, config, backbone)
    set_trainable(network, True)
    return network.num_parameters(only_trainable=True)


def _shadow(method: MethodSpec, base: PreTrainedModel, target: int | None) -> Sized:
    """r, h_g and the MLP width by one common factor; the width, the finest of the three, takes up the rest.

    The count is linear in each of them, so four counts say all. A shadow that is given (blocks of the base, a model of its
    own) has no width to choose: there the rank is all.

    Raises:
        ConfigError: no size changes what is trained.
    """
    config = shadow_config(method, is_classifier=hasattr(base, "score"))
    if target is None:
        return Sized(trainable=count_shadow(config, base, method.shadow_shape))
    given = {name: getattr(config, name) for name in SIZES}
    if given["shadow_intermediate_size"] is None:
        width = getattr(base.config, architecture_of(base.config).mlp_width[0])
        given["shadow_intermediate_size"] = width or 4 * base.config.hidden_size
    config = config.replace(**given)
    count = count_shadow(config, base)
    slopes = {name: count_shadow(config.replace(**{name: given[name] + 1}), base) - count for name in SIZES}
    scaled = [name for name in SIZES if config.is_implicit or slopes[name]]
    if not any(slopes.values()):
        raise ConfigError("no size of this shadow changes what is trained; give the method budget: own")
    fixed = count - sum(slopes[name] * given[name] for name in scaled)
    factor = (target - fixed) / (count - fixed)
    sizes = {name: max(SMALLEST[name], round(factor * given[name])) for name in scaled}
    finest = min((name for name in scaled if slopes[name]), key=lambda name: (name != "shadow_intermediate_size", slopes[name]))
    sizes[finest] += round((target - fixed - sum(slopes[name] * sizes[name] for name in scaled)) / slopes[finest])
    sizes = {name: max(SMALLEST[name], size) for name, size in sizes.items()}
    return Sized(trainable=count_shadow(config.replace(**sizes), base), target=target, shadow=sizes)
