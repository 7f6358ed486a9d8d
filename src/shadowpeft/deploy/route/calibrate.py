"""A router from a trained adapter and validation rows: both sides answer, and the edge's scores are kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowpeft.deploy.route.calibration import auroc
from shadowpeft.deploy.route.grammar import reason_to_escalate, skill_name
from shadowpeft.deploy.route.operating import Example
from shadowpeft.deploy.route.scores import SCORES, all_scores
from shadowpeft.deploy.serve.batch import most_tokens
from shadowpeft.deploy.serve.exported import Served
from shadowpeft.deploy.serve.mixed import Path
from shadowpeft.deploy.serve.offline import Said, answer_all
from shadowpeft.deploy.serve.service import end_ids
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.train.answers import REMOTE, Row, first_call
from shadowpeft.train.data import all_prompt_ids, cut_left
from shadowpeft.train.tasks import Task

# Targets that mean "not for this device": the robot's, and CLINC150's.
OUT_OF_SCOPE = (REMOTE, "oos()")
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Both sides' answers to the same rows.

    Attributes:
        examples: as the router sees them.
        cloud_scores: the attached model's own scores, for comparison.
    """

    examples: list[Example]
    cloud_scores: list[dict[str, float]]

    def cloud_auroc_in_scope(self) -> dict[str, float | None]:
        """How well the attached model's scores tell in from out of scope; ``first_logprob`` is the usual baseline,
        maximum softmax probability."""
        is_in = [not example.is_out_of_scope for example in self.examples]
        return {name: auroc([scores[name] for scores in self.cloud_scores], is_in) for name in SCORES}


def skills_of(task: Task, rows: Sequence[Row]) -> tuple[str, ...] | None:
    """Names of the skills in the rows' targets; None for a task that is not answered by calls."""
    if task.extract is not first_call:
        return None
    calls = {task.target(row).strip() for row in rows}
    return tuple(sorted({skill_name(call) for call in calls if call not in OUT_OF_SCOPE}))


def is_out_of_scope(task: Task, row: Row) -> bool:
    return task.target(row).strip() in OUT_OF_SCOPE


def check_routable(task: Task) -> None:
    """Whether each answer to the task is right or wrong.

    Raises:
        ConfigError: the task is not answered by text, or scored over all rows together.
    """
    if task.kind != "generation":
        raise ConfigError(f"task {task.name!r} is answered by a {task.kind}; a router needs generated answers")
    if task.corpus is not None and task.metric == task.corpus.name:
        raise ConfigError(
            f"task {task.name!r} is scored over all rows together ({task.metric}), which calls no row right or wrong; a "
            "router needs a task that scores each row, such as robot or clinc150"
        )


def observe(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    *,
    adapter: str,
    skills: Sequence[str] | None,
    edge: Served | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Observed:
    """Asks the detached shadow and the attached model of a shadow model.

    Args:
        edge: what the device runs, such as an exported shadow; None: the adapter, detached.

    Raises:
        ConfigError: the task is not answered by text, or scored over all rows together.
        DataError: no rows.
    """
    check_routable(task)
    if not rows:
        raise DataError(f"there are no rows of task {task.name!r} to calibrate on")
    ask = partial(answers, tokenizer=tokenizer, task=task, rows=rows, batch_size=batch_size, progress=progress)
    if edge is None:
        on_edge = ask(model, path=Path(adapter=adapter, uses_base=False))
    else:
        on_edge = ask(edge, path=Path(adapter=None, uses_base=True))
    in_cloud = ask(model, path=Path(adapter=adapter, uses_base=True))
    examples = []
    for row, here, there in zip(rows, on_edge, in_cloud, strict=True):
        examples.append(
            Example(
                scores=all_scores(here.facts),
                edge=headline(task, here.text, row),
                cloud=headline(task, there.text, row),
                reason=reason_to_escalate(here.text, skills),
                is_out_of_scope=is_out_of_scope(task, row),
            )
        )
    return Observed(examples=examples, cloud_scores=[all_scores(said.facts) for said in in_cloud])


def answers(
    model: Served,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    path: Path,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[Said]:
    """Greedy answers under the task's own prompts."""
    positions = most_tokens(model)
    num_new = int(min(task.max_new_tokens, positions / 2))
    prompts = [
        cut_left(tokenizer, ids, int(min(positions - num_new, 10**6))) for ids in all_prompt_ids(task, tokenizer, rows)
    ]
    return answer_all(
        model,
        tokenizer,
        prompts,
        path,
        max_tokens=num_new,
        ends=end_ids(model, tokenizer),
        batch_size=batch_size,
        progress=progress,
    )


def headline(task: Task, text: str, row: Row) -> float:
    """1 where the task's metric gives an answer full marks, else 0."""
    return float(task.score(task.extract(text), row)[task.metric] >= 1)
