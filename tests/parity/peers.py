"""Our model and a peer's on equal bases with equal random weights, and what both compute of one batch."""

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModel, PreTrainedModel

from models import randomise, tiny_base, tokens
from shadowpeft import ShadowConfig, ShadowModel, get_shadow_model
from shadowpeft.model.architectures import architecture_of, decoder_of
from shadowpeft.model.cache import CACHE
from shadowpeft.model.convert import blocks_path, from_authors, from_peft, to_authors, to_peft

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "opt")
NUM_BLOCKS = 4
NUM_LABELS = 3
ALPHA, LAMBDA, RANK, UPDATE_HIDDEN = 0.5, 0.3, 4, 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison.

    Attributes:
        architecture: model type of the base.
        shape: ``small``: one shadow block; ``large``: two with fewer heads and a narrower MLP; ``projected``: two of
            half the base's width, with a token table of their own.
        is_classifier: sequence classification instead of causal language modelling.
        dropout: above 0, both are compared in training mode with the same seed: dropout falls on the same entries only
            if it sits in the same places, in the same order.
    """

    architecture: str
    shape: str = "small"
    is_classifier: bool = False
    dropout: float = 0.0

    def __str__(self) -> str:
        return "-".join(
            [self.architecture, self.shape, *["classifier"] * self.is_classifier, *["dropout"] * bool(self.dropout)]
        )

    @property
    def num_layers(self) -> int:
        return 1 if self.shape == "small" else 2

    @property
    def num_heads(self) -> int | None:
        return None if self.shape == "small" else 2

    @property
    def mlp_width(self) -> int:
        return 24 if self.shape == "small" else 20


CASES = [
    *(Case(architecture=name, shape=shape) for name in ARCHITECTURES for shape in ("small", "large")),
    *(Case(architecture=name, shape="projected") for name in ("llama", "gemma3_text", "gpt2")),
    *(Case(architecture=name, dropout=0.3) for name in ("llama", "gpt2")),
    *(Case(architecture=name, is_classifier=True) for name in ("llama", "qwen3", "gpt2")),
]


@dataclass(frozen=True)
class Outcome:
    """What one side computes: logits, the shadow's own loss, the total loss, and gradients under our names.

    ``idle`` holds the peer's names of trained weights that received no gradient.
    """

    logits: Tensor
    auxiliary_loss: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    idle: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Comparison:
    """Both sides on one batch, and the logits of the base without an adapter."""

    ours: Outcome
    theirs: Outcome
    base_logits: Tensor


def random_base(case: Case) -> PreTrainedModel:
    """A base in float64 that two calls make equal."""
    base = tiny_base(case.architecture, labels=NUM_LABELS if case.is_classifier else None)
    randomise(base, seed=3, std=0.05)
    if case.architecture in {"gpt2", "opt"}:
        # No field of these configs, but tiny_base sets it for all; both peers would take it for the MLP width.
        del base.config.intermediate_size
    base.loss_function = classifier_loss if case.is_classifier else token_loss
    return base


def token_loss(logits: Tensor, labels: Tensor, *_: Any, **__: Any) -> Tensor:
    """The bases' next-token loss in float64: transformers' own rounds the logits to fp32 first."""
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))


def classifier_loss(labels: Tensor, pooled_logits: Tensor, **_: Any) -> Tensor:
    return F.cross_entropy(pooled_logits, labels)


def batch(case: Case) -> dict[str, Tensor]:
    """Two rows, the second with two padding tokens on its right."""
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    ids = ids * mask
    labels = torch.tensor([2, 0]) if case.is_classifier else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def seeded(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    torch.manual_seed(5)
    return model(**inputs)


class Authors:
    """``shadow-peft``, the authors' package."""

    name = "authors"
    package = "shadow_peft"
    install = "pip install --no-deps shadow-peft==0.1.1"
    # Fed with the base's embeddings, but only a table called `embed_tokens` is taken out of the shadow.
    unused_tables: ClassVar = {"gpt2": {"wte"}, "gpt_neox": {"embed_in"}, "opt": {"decoder.embed_tokens"}}

    def never_trained(self, case: Case) -> set[str]:
        """Names of the update behind the last block, where no block is left to correct, and of unused token tables."""
        update = {
            f"shadow_update_model.update_{part}.{NUM_BLOCKS - 2}.{position}.weight"
            for part, last in (("transforms", 3), ("gates", 2))
            for position in (0, last)
        }
        tables = set() if case.shape == "projected" else self.unused_tables.get(case.architecture, set())
        return update | {f"shadow_model.{name}.weight" for name in tables}

    def build(self, base: PreTrainedModel, case: Case, folder: str) -> nn.Module:
        import shadow_peft

        config = shadow_peft.ShadowConfig(
            num_shadow_layers=case.num_layers,
            injection_hidden_size=RANK,
            gate_hidden_size=UPDATE_HIDDEN,
            alpha=ALPHA,
            dropout=case.dropout,
            shadow_intermediate_size=case.mlp_width,
            shadow_num_attention_heads=case.num_heads,
            shadow_num_key_value_heads=self._kv_heads(case),
        )
        explicit = AutoModel.from_pretrained(folder) if case.shape == "projected" else None
        model = shadow_peft.get_shadow_model(base, config, shadow_model=explicit)
        task = shadow_peft.ShadowForSequenceClassification if case.is_classifier else shadow_peft.ShadowForCausalLM
        return task(model, shadow_loss_weight=LAMBDA).double()

    def config(self, case: Case, folder: str) -> ShadowConfig:
        sizes: dict[str, Any] = {
            "shadow_num_hidden_layers": case.num_layers,
            "shadow_intermediate_size": case.mlp_width,
            "shadow_num_attention_heads": case.num_heads,
            "shadow_num_key_value_heads": self._kv_heads(case),
        }
        explicit = {"shadow_model": folder, "freeze_embeddings": False}
        return _preset("authors", case, explicit if case.shape == "projected" else sizes)

    @staticmethod
    def _kv_heads(case: Case) -> int | None:
        has_field = architecture_of(tiny_base(case.architecture).config).kv_heads is not None
        return 1 if case.shape == "large" and has_field else None

    def weights(self, model: Any) -> dict[str, nn.Parameter]:
        """Every trained weight under its name in the saved files."""
        found = dict(model.peft_model.state_dict(keep_vars=True))
        for head in ("classifier_head", "shadow_classifier_head"):
            found |= {f"{head}.{name}": p for name, p in getattr(model, head, nn.Identity()).named_parameters()}
        return found

    def load(self, model: Any, tensors: dict[str, Tensor]) -> None:
        model.load_state_dict(tensors)
        for head in ("classifier_head", "shadow_classifier_head"):
            if hasattr(model, head):
                getattr(model, head).load_state_dict({"weight": tensors[f"{head}.weight"]})

    def save(self, model: Any, folder: Path) -> dict[str, Tensor]:
        """What the package itself writes."""
        model.save_pretrained(folder)
        return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}

    def run(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, auxiliary loss, total loss); the second is not reported, but is the first factor of its weight."""
        totals = []
        for weight in (0.0, 1.0):
            model.shadow_loss_weight = weight
            totals.append(seeded(model, inputs).loss.detach())
        model.shadow_loss_weight = LAMBDA
        output = seeded(model, inputs)
        return output.logits, totals[1] - totals[0], output.loss

    def read(self, tensors: dict[str, Tensor], ours: ShadowModel) -> dict[str, Tensor]:
        return from_authors(tensors, ours.network())

    def write(self, ours: ShadowModel) -> dict[str, Tensor]:
        return to_authors(ours.network())


class Peft:
    """Hugging Face ``peft``."""

    name = "peft"
    package = "peft"
    install = "pip install peft==0.21.2"
    # Fed with the base's embeddings, but only a table called `embed_tokens` is taken out of the shadow.
    unused_tables: ClassVar = {"gpt2": {"wte"}, "gpt_neox": {"embed_in"}}
    blocks: ClassVar = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}

    def never_trained(self, case: Case) -> set[str]:
        """Names of the update behind the last block, where no block is left to correct, and of unused token tables."""
        last_block = f"base_model.model.{self.blocks.get(case.architecture, 'model.layers')}.{NUM_BLOCKS - 1}"
        update = {
            f"{last_block}.shadow_update_{part}.default.{position}.{attribute}"
            for part in ("transform", "gate")
            for position in (0, 2)
            for attribute in ("weight", "bias")
        }
        tables = set() if case.shape == "projected" else self.unused_tables.get(case.architecture, set())
        return update | {f"base_model.shadow_backbone.default.{name}.weight" for name in tables}

    def build(self, base: PreTrainedModel, case: Case, folder: str) -> nn.Module:
        import peft

        config = peft.ShadowConfig(
            task_type="SEQ_CLS" if case.is_classifier else "CAUSAL_LM",
            r=RANK,
            update_hidden_size=UPDATE_HIDDEN,
            shadow_alpha=ALPHA,
            shadow_dropout=case.dropout,
            auxiliary_loss_weight=LAMBDA,
            shadow_num_hidden_layers=case.num_layers,
            shadow_hidden_size=16 if case.shape == "projected" else None,
            shadow_intermediate_size=case.mlp_width,
            shadow_num_attention_heads=case.num_heads,
        )
        return peft.get_peft_model(base, config).double()

    def config(self, case: Case, folder: str) -> ShadowConfig:
        base = tiny_base(case.architecture).config
        row = architecture_of(base)
        sizes: dict[str, Any] = {
            "shadow_num_hidden_layers": case.num_layers,
            "shadow_intermediate_size": case.mlp_width,
            "shadow_num_attention_heads": case.num_heads,
        }
        if case.shape == "projected":
            # peft feeds a mirror of another width from a table of its own, and leaves the width of its heads alone.
            sizes |= {"shadow_hidden_size": 16, "share_embeddings": False}
            sizes |= {"shadow_head_dim": base.head_dim} if row.head_dim else {}
        return _preset("peft", case, sizes)

    def weights(self, model: Any) -> dict[str, nn.Parameter]:
        """Every trained weight under its name in the saved file."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(model, state_dict=dict(model.named_parameters()), save_embedding_layers=False)  # type: ignore[return-value]

    def load(self, model: Any, tensors: dict[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict

        found = set_peft_model_state_dict(model, tensors)
        assert not found.unexpected_keys

    def save(self, model: Any, folder: Path) -> dict[str, Tensor]:
        """What the package itself writes."""
        model.save_pretrained(folder, save_embedding_layers=False)
        return load_file(folder / "adapter_model.safetensors")

    def run(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, auxiliary loss, total loss)."""
        output = seeded(model, inputs)
        return output.logits, output.shadow_loss, output.loss

    def read(self, tensors: dict[str, Tensor], ours: ShadowModel) -> dict[str, Tensor]:
        return from_peft(tensors, ours.network(), blocks=blocks_path(ours.base))

    def write(self, ours: ShadowModel) -> dict[str, Tensor]:
        return to_peft(ours.network(), blocks=blocks_path(ours.base))


Peer = Authors | Peft
PEERS: dict[str, Peer] = {"authors": Authors(), "peft": Peft()}


def _preset(name: str, case: Case, sizes: dict[str, Any]) -> ShadowConfig:
    return ShadowConfig.preset(
        name,
        task_type="SEQ_CLS" if case.is_classifier else "CAUSAL_LM",
        r=RANK,
        update_hidden_size=UPDATE_HIDDEN,
        shadow_alpha=ALPHA,
        shadow_dropout=case.dropout,
        auxiliary_loss_weight=LAMBDA,
        adapter_dtype="float64",
        **sizes,
    )


def build_pair(peer: Peer, case: Case) -> tuple[ShadowModel, nn.Module]:
    """(ours, the peer's), with the same random weights everywhere, W_up included."""
    with tempfile.TemporaryDirectory() as folder:
        if case.shape == "projected":
            narrow = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "layer_types": None}
            decoder_of(tiny_base(case.architecture, dtype=torch.float32, **narrow)).save_pretrained(folder)
        theirs = peer.build(random_base(case), case, folder)
        ours = get_shadow_model(random_base(case), peer.config(case, folder))
    weights = peer.weights(theirs)
    randomise(nn.ParameterList(weights.values()))
    ours.network().load_state_dict(peer.read({name: p.detach() for name, p in weights.items()}, ours))
    return ours.train(case.dropout > 0), theirs.train(case.dropout > 0)


def outcome_of_ours(ours: ShadowModel, inputs: dict[str, Tensor]) -> Outcome:
    output = seeded(ours, inputs | ({"output_logits": True} if ours.can_generate() else {}))
    output.loss.backward()
    gradients = {name: p.grad for name, p in ours.network().named_parameters()}
    return Outcome(output.logits.detach(), output.shadow_loss, output.loss.detach(), gradients)


def outcome_of_theirs(peer: Peer, theirs: nn.Module, ours: ShadowModel, inputs: dict[str, Tensor]) -> Outcome:
    """The peer's outcome; the converter carries its gradients over to our names, as it does with weights."""
    logits, auxiliary, loss = peer.run(theirs, inputs)
    loss.backward()
    weights = peer.weights(theirs)
    idle = frozenset(name for name, p in weights.items() if p.grad is None)
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in weights.items()}
    return Outcome(logits.detach(), auxiliary.detach(), loss.detach(), peer.read(gradients, ours), idle)


@cache
def compare(peer: Peer, case: Case) -> Comparison:
    ours, theirs = build_pair(peer, case)
    inputs = batch(case)
    with torch.no_grad():
        base_logits = ours(**inputs, adapter="__base__").logits
    return Comparison(outcome_of_ours(ours, inputs), outcome_of_theirs(peer, theirs, ours, inputs), base_logits)


def check_equality(comparison: Comparison) -> None:
    """Logits, both losses and every gradient, within torch's default tolerances for float64."""
    ours, theirs = comparison.ours, comparison.theirs
    assert_close(ours.logits, theirs.logits)
    assert_close(ours.auxiliary_loss, theirs.auxiliary_loss)
    assert_close(ours.loss, theirs.loss)
    assert_close(ours.gradients, theirs.gradients)


def check_substance(comparison: Comparison) -> None:
    """What is compared is far above the tolerances: the shadow moves the logits, and every weight has a gradient."""
    ours = comparison.ours
    assert (ours.logits - comparison.base_logits).abs().amax() > 0.1
    assert ours.auxiliary_loss > 0.1
    # A bias on the keys of absolute-position attention shifts all scores of a query alike: its gradient is zero.
    faint = [name for name, gradient in ours.gradients.items() if gradient.abs().amax() < 1e-4]
    assert all(name.endswith("k_proj.bias") and name.startswith("backbone.decoder.") for name in faint), faint


def check_decoding(peer: Peer, architecture: str) -> None:
    """Greedy decoding with caches, past the sliding window of 6 that some bases have, gives the same tokens."""
    ours, theirs = build_pair(peer, Case(architecture=architecture, shape="large"))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "use_cache": True}
    ids = tokens(2, 5)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # peft 0.21 looks for a cache by the name it had before transformers 5.24, and without it its shadow forgets the prompt.
    finds_cache = not isinstance(peer, Peft) or CACHE == "past_key_values"
    expected = theirs.generate(**inputs, **options | {"use_cache": finds_cache})
    assert torch.equal(ours.generate(**inputs, **options), expected)


@torch.no_grad()
def check_writing(peer: Peer, case: Case) -> None:
    """Weights that we write for the peer give it our logits."""
    ours, theirs = build_pair(peer, case)
    randomise(ours.network(), seed=11)
    inputs = {name: value for name, value in batch(case).items() if name != "labels"}
    expected = ours(**inputs).logits
    assert not torch.allclose(theirs(**inputs).logits, expected)
    peer.load(theirs, peer.write(ours))
    assert_close(theirs(**inputs).logits, expected)
