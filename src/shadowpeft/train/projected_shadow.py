"""What pretraining trains: a small model behind the large one's frozen head, and its three losses."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from shadowpeft.core import ShadowNetwork
from shadowpeft.core.head_loss import LossSpec
from shadowpeft.core.losses import shared_head_losses
from shadowpeft.model.architectures import architecture_of, head_of
from shadowpeft.train.pretrain_config import PretrainConfig


class ProjectedShadow(nn.Module):
    """``y = W_lm P h`` (Eq. 11): what is trained is registered, what is frozen and large is not.

    Args:
        base: the large model; its head, and for distillation all of it, is used frozen.
        network: backbone and projection; its steps stay unused.
        config: objective and weights.
        own_head: the small model's head, for the objective ``projection``.
    """

    def __init__(
        self, base: PreTrainedModel, network: ShadowNetwork, config: PretrainConfig, own_head: PreTrainedModel | None
    ) -> None:
        super().__init__()
        self.backbone, self.projection = network.backbone, network.projection
        self.embedding_projection = network.embedding_projection
        # In tuples, so that neither checkpoints nor the optimizer see them.
        self._frozen = (base.requires_grad_(False).eval(),)
        self._own_head = (own_head,)
        self._network = (network,)
        self._config = config
        self.requires_grad_(True)
        if config.objective == "projection":
            self.backbone.requires_grad_(False)
        elif not config.train_embeddings and not network.config.shares_embeddings:
            self.backbone.get_input_embeddings().requires_grad_(False)

    def frozen_to(self, device: torch.device) -> None:
        """Moves what is not registered."""
        for (module,) in (self._frozen, self._own_head):
            if module is not None:
                module.to(device)  # type: ignore[arg-type]

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        """The shadow behind the large head: logits [B, T, V], or the objective's loss with labels.

        The loss of ``causal_lm`` comes without logits, whose memory it does not need; that of a teacher with them.
        """
        hidden = self._hidden(input_ids)
        projected = self._project(hidden)
        if labels is not None and self._config.objective == "causal_lm":
            return CausalLMOutput(loss=self._next_token_loss(projected, labels))
        logits = self._logits(self._frozen[0], projected)
        loss = None if labels is None else teacher_loss(self._teacher(input_ids, hidden), logits, self._config)
        return CausalLMOutput(loss=loss, logits=logits)

    def _hidden(self, input_ids: Tensor) -> Tensor:
        network, base = self._network[0], self._frozen[0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._config.objective != "projection"):
            if not network.config.shares_embeddings:
                return self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state
            embedded = base.get_input_embeddings()(input_ids).to(network.dtype)
            if self.embedding_projection is not None:
                embedded = self.embedding_projection(embedded)
            return self.backbone(inputs_embeds=embedded, use_cache=False).last_hidden_state

    def _project(self, hidden: Tensor) -> Tensor:
        return hidden if self.projection is None else self.projection(hidden)

    @staticmethod
    def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
        head = head_of(model)
        return architecture_of(model.config).finish_logits(model.config, head(hidden.to(head.weight.dtype))).float()

    def _next_token_loss(self, projected: Tensor, labels: Tensor) -> Tensor:
        head, base_config = head_of(self._frozen[0]), self._frozen[0].config
        spec = LossSpec(finish=architecture_of(base_config).finish(base_config))
        projected = projected.to(head.weight.dtype)
        return shared_head_losses(spec, head, projected, projected, labels).total

    @torch.no_grad()
    def _teacher(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits [B, T, V] to be matched: of the small model's own head, or of the large model."""
        if self._config.objective == "projection":
            assert self._own_head[0] is not None
            return self._logits(self._own_head[0], hidden)
        return self._frozen[0](input_ids=input_ids, use_cache=False).logits.float()


def teacher_loss(teacher: Tensor, student: Tensor, config: PretrainConfig) -> Tensor:
    """``kl_weight * T^2 KL(teacher || student) + mse_weight * MSE``, means over positions (and, for MSE, tokens)."""
    heat = config.temperature
    log_student, log_teacher = (F.log_softmax(x.flatten(0, -2) / heat, dim=-1) for x in (student, teacher))
    divergence = F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean") * heat**2
    return config.kl_weight * divergence + config.mse_weight * F.mse_loss(student, teacher)
