"""Answers that the shadow drafts and the attached model verifies, one request at a time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shadowpeft.deploy.serve.errors import ApiError
from shadowpeft.deploy.serve.sequence import Sequence


def is_available() -> bool:
    """Whether this server drafts. Not yet: the counts of drafts do not reach its answers, so it refuses the mode."""
    return False


class Listener:
    """Takes tokens as ``generate`` finds them (a streamer of transformers' shape) and hands them to the answer."""

    def __init__(self, sequence: Sequence, meanwhile: Callable[[], bool]) -> None:
        self.sequence, self.meanwhile = sequence, meanwhile
        self.saw_prompt = False
        self.goes_on = True

    def put(self, value: Tensor) -> None:
        if not self.saw_prompt:  # generate announces the prompt first
            self.saw_prompt = True
            return
        for token in value.flatten().tolist():
            self.goes_on = self.goes_on and self.sequence.take(token, None)
        self.goes_on = self.meanwhile() and self.goes_on

    def end(self) -> None:
        pass


def speculate(model: Any, sequence: Sequence, meanwhile: Callable[[], bool]) -> tuple[int, int]:
    """Answers one job by speculative decoding; returns (tokens drafted, tokens accepted).

    Args:
        meanwhile: called whenever there are new tokens, so that other rows advance; False ends the answer.

    Raises:
        ApiError: this installation cannot draft.
    """
    if not is_available():
        raise ApiError("speculative decoding is not available in this installation", status=501, code="not_available")
    job, listener = sequence.job, Listener(sequence, meanwhile)
    is_sampled = job.sampling.temperature > 0
    drawn = {"temperature": job.sampling.temperature, "top_p": job.sampling.top_p} if is_sampled else {}
    ids = torch.tensor([job.prompt], device=model.device)
    with torch.random.fork_rng(devices=[]), model.using_adapter(job.path.adapter), torch.inference_mode():
        torch.manual_seed(sequence.generator.initial_seed())
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            speculative=job.num_drafts,
            max_new_tokens=job.max_tokens,
            do_sample=is_sampled,
            eos_token_id=list(job.ends) or None,
            streamer=listener,
            stopping_criteria=[lambda ids, scores, **_: torch.full((len(ids),), not listener.goes_on)],
            return_dict_in_generate=True,
            **drawn,
        )
    statistics = output.statistics
    return (0, 0) if statistics is None else (statistics.num_drafted, statistics.num_accepted)
