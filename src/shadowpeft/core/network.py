"""The module that owns every trained weight of one adapter."""

from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from shadowpeft.core import inference
from shadowpeft.core.config import ShadowConfig
from shadowpeft.core.inference import beside, layer_norm
from shadowpeft.core.kernels import Branch, StepSpec, StepWeights, fused_step, step_backend
from shadowpeft.core.shapes import States
from shadowpeft.core.step import Injection, Update


class ShadowNetwork(nn.Module):
    """Shadow backbone, projection, and the steps between the base's blocks.

    A checkpoint is this module's ``state_dict()``, the optimizer's work list its trainable
    ``parameters()``, and a second adapter is a second network.

    Args:
        config: the adapter's configuration.
        backbone: decoder stack with final norm; called with ``inputs_embeds`` or ``input_ids``, returns
            ``last_hidden_state`` [B, T, d_s].
        width: d, hidden width of the base.
        num_blocks: L, decoder blocks of the base.
        backbone_width: d_s, hidden width of the backbone.
        embedding_width: width of the base's embeddings if they are shared, else None.
        num_labels: classes of a sequence classifier, else None.

    Attributes:
        projection: W_proj of Eq. 10, ``Linear(d_s, d)``, where the widths differ, else None.
        embedding_projection: ``Linear(embedding_width, d_s)`` in front of a backbone that shares
            embeddings of another width, else None. It folds into the embedding table on detaching.
        head, shadow_head: the two trained classification heads (Eq. 9), else None.
        identity: tells networks apart; a copy keeps it, as its weights are the same.
    """

    # A decoder of transformers, which this folder knows nothing of.
    backbone: Any

    def __init__(
        self,
        config: ShadowConfig,
        backbone: nn.Module,
        *,
        width: int,
        num_blocks: int,
        backbone_width: int,
        embedding_width: int | None,
        num_labels: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.identity = uuid4().hex
        self.num_blocks = num_blocks
        self.width = width
        self.backbone = backbone
        self.projection = nn.Linear(backbone_width, width, bias=False) if backbone_width != width else None
        self.embedding_projection = (
            nn.Linear(embedding_width, backbone_width, bias=False)
            if embedding_width is not None and embedding_width != backbone_width
            else None
        )
        num_steps = num_blocks - config.first_block
        steps = range(self._copies(num_steps))
        has_branch = config.first_block > 0 or config.share_steps
        self.injections = nn.ModuleList(Injection(width, config, has_branch=has_branch or index > 0) for index in steps)
        # In front of the MLPs, the first of them between the first two sublayers that a correction may lie between.
        num_midpoints = num_blocks - self.first_midpoint if config.has_midpoints else 0
        self.midpoints = nn.ModuleList(Injection(width, config) for _ in range(self._copies(num_midpoints)))
        # No update behind the last block: its result would feed nothing and never receive a gradient.
        num_updates = num_steps - 1 if config.use_update else 0
        self.updates = nn.ModuleList(Update(width, config) for _ in range(self._copies(num_updates)))
        has_norm = config.update_norm == "layernorm" and num_updates > 0
        self.update_norm = nn.LayerNorm(width) if has_norm else None
        is_classifier = num_labels is not None
        self.head = nn.Linear(width, num_labels, bias=False) if is_classifier else None
        self.shadow_head = nn.Linear(width, num_labels, bias=False) if is_classifier else None

    def _copies(self, count: int) -> int:
        return min(count, 1) if self.config.share_steps else count

    @property
    def step_parts(self) -> list[nn.Module]:
        """What refines the base's blocks, which a detached shadow does without."""
        parts = (self.injections, self.midpoints, self.updates, self.update_norm)
        return [part for part in parts if part is not None]

    def project(self, hidden: Tensor) -> Tensor:
        """Eq. 10: [B, T, d_s] -> [B, T, d]."""
        return hidden if self.projection is None else self.projection(hidden.to(self.projection.weight.dtype))

    @property
    def first_midpoint(self) -> int:
        """The first block of which what goes from attention into the MLP is corrected, where ``inject_between`` says so."""
        return max(self.config.first_block - 1, 0)

    def step(self, block_index: int, h: States, s: States, added: Tensor | None = None) -> tuple[States, States]:
        """What happens in front of one block: update s from the last block's output, then correct its input.

        Args:
            block_index: l, the block about to run.
            h: h_out(l-1), [B, T, d].
            s: the state in front of the last block, [B, T, d].
            added: what was added to the residual stream last, [B, T, d]; read with ``inject_branch``.

        Returns:
            ``(h(l), s(l-1))`` for l past the first refined block; in front of the first one s is s(0), unchanged;
            and in front of blocks that are not refined, ``h`` and ``s`` themselves.
        """
        if not (self.training or torch.is_grad_enabled()):
            return inference.step(self, block_index, h, s, added)
        if block_index < self.config.first_block:
            return h, s
        injection, update = self.parts(block_index)
        return self._refine(injection, update, h, s, added)

    def step_between(self, block_index: int, h: States, s: States, added: Tensor | None = None) -> States:
        """What happens between attention and the MLP of a block, with ``inject_between="sublayers"``: the correction alone.

        Args:
            block_index: l.
            h: the residual stream behind attention, [B, T, d].
            s: the state in front of the block, [B, T, d].
            added: what attention added, [B, T, d].
        """
        midpoint = self.midpoint(block_index)
        if midpoint is None:
            return h
        if self.training or torch.is_grad_enabled():
            return self._refine(midpoint, None, h, s, added)[0]
        return inference.correct(midpoint, *beside(midpoint.W_down, h, s, added))

    def _refine(
        self, injection: Injection, update: Update | None, h: Tensor, s: Tensor, added: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        h, s, added = beside(injection.W_down, h, s, added)
        needs_grad = torch.is_grad_enabled() and (h.requires_grad or s.requires_grad or injection.W_up.requires_grad)
        backend, _ = step_backend(
            self.config, device=h.device, dtype=h.dtype, training=injection.training, needs_grad=needs_grad
        )
        if backend != "autograd":
            branch = None if added is None or injection.W_branch is None else Branch(added, injection.W_branch)
            return fused_step(backend, self._spec(injection), h, s, self._weights(injection, update), branch)
        if update is not None:
            s = update(self._normed(h), s)
        return injection(h, s, added), s

    def midpoint(self, block_index: int) -> Injection | None:
        """The correction between attention and the MLP of a block, if there is one."""
        if not self.config.has_midpoints or block_index < self.first_midpoint:
            return None
        return self.midpoints[0 if self.config.share_steps else block_index - self.first_midpoint]  # type: ignore[return-value]

    def parts(self, block_index: int) -> tuple[Injection, Update | None]:
        """What the step in front of a refined block is made of; the first one has no update."""
        index = block_index - self.config.first_block
        injection: Any = self.injections[0 if self.config.share_steps else index]
        if index == 0 or not len(self.updates):
            return injection, None
        update: Any = self.updates[0 if self.config.share_steps else index - 1]
        return injection, update

    def _spec(self, injection: Injection) -> StepSpec:
        eps = 1e-5 if self.update_norm is None else self.update_norm.eps
        return StepSpec.of(self.config, training=injection.training, norm_eps=eps)

    def _weights(self, injection: Injection, update: Update | None) -> StepWeights:
        ours = StepWeights(W_down=injection.W_down, W_up=injection.W_up, diagonal=injection.diagonal)
        if update is None:
            return ours
        norm = self.update_norm
        return ours._replace(
            **update.named_weights(),
            norm_weight=None if norm is None else norm.weight.to(injection.W_down.device),
            norm_bias=None if norm is None else norm.bias.to(injection.W_down.device),
        )

    def _normed(self, h: Tensor) -> Tensor:
        return h if self.update_norm is None else layer_norm(self.update_norm, h)

    def num_parameters(self, *, only_trainable: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    @property
    def dtype(self) -> torch.dtype:
        return self.injections[0].W_down.dtype  # type: ignore[union-attr, return-value]
