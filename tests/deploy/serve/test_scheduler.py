"""Decoding together equals decoding alone, for every mix of adapters, modes, lengths and arrival times."""

import queue
import random
import threading
import time

import pytest
import torch

from deploy.running import held_steps
from deploy.tiny import byte_tokenizer, shadow_model
from models import randomise, tiny_config
from shadowpeft.deploy.serve import batch as batches
from shadowpeft.deploy.serve import joining
from shadowpeft.deploy.serve.batch import Batch
from shadowpeft.deploy.serve.errors import ApiError
from shadowpeft.deploy.serve.metrics import Metrics
from shadowpeft.deploy.serve.mixed import Path
from shadowpeft.deploy.serve.sampling import Sampling
from shadowpeft.deploy.serve.scheduler import Scheduler
from shadowpeft.deploy.serve.sequence import End, Job, Piece, Sequence

TOKENIZER = byte_tokenizer()
PATHS = {
    "base": Path(adapter=None, uses_base=True),
    "robot": Path(adapter="robot", uses_base=True),
    "home": Path(adapter="home", uses_base=True),
    "robot detached": Path(adapter="robot", uses_base=False),
    "home detached": Path(adapter="home", uses_base=False),
}
FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt2", "mistral", "opt", "gpt_neox"]


def job(name, length, seed, **options):
    prompt = tuple(random.Random(seed).randrange(3, 259) for _ in range(length))
    return Job(**{"prompt": prompt, "path": PATHS[name], "max_tokens": 12, "num_top": 0} | options)


@torch.no_grad()
def reference(model, wanted):
    """Greedy tokens, one full pass without a cache for each."""
    path = wanted.path
    asked = model if path.uses_base else model.detach(path.adapter)
    options = {"adapter": path.adapter or "__base__"} if path.uses_base else {}
    ids = torch.tensor([wanted.prompt])
    for _ in range(wanted.max_tokens):
        best = asked(ids, use_cache=False, **options).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, best], 1)
    return ids[0, len(wanted.prompt) :].tolist()


def listening(wanted):
    heard = []
    return Sequence(wanted, heard.append, TOKENIZER), heard


def tokens_of(heard):
    return [fact.token for event in heard if isinstance(event, Piece) for fact in event.tokens]


def decode(model, batch):
    while len(batch):
        batch = batches.step(model, batch)


def with_finer_corrections(model_type):
    """The first adapter's rows are corrected between blocks, the second's between sublayers too, which reads branches."""
    model = shadow_model(model_type, adapters=("robot",))
    finer = {"inject_between": "sublayers", "inject_branch": True, "scale_state": True}
    model.add_adapter("home", tiny_config(**finer))
    randomise(model.network("home"), seed=2)
    return model.eval()


@pytest.mark.parametrize("model_type", [*FAMILIES, "between sublayers"])
def test_rows_of_all_adapters_and_modes_that_join_late_get_their_own_greedy_answer(model_type):
    model = with_finer_corrections("qwen3") if model_type == "between sublayers" else shadow_model(model_type)
    jobs = [job(name, 3 + 5 * i, i, max_tokens=6 + 4 * i) for i, name in enumerate(PATHS)]
    rows = [listening(wanted) for wanted in jobs]
    batch = batches.prefill(model, [rows[3][0], rows[0][0]])
    for others in ([1], [4, 2]):
        batch = batches.step(model, batches.step(model, batch))
        batch = batches.merge(batch, batches.prefill(model, [rows[i][0] for i in others]))
    decode(model, batch)
    for wanted, (_, heard) in zip(jobs, rows, strict=True):
        assert tokens_of(heard) == reference(model, wanted)
        assert heard[-1] == End(reason="length", num_tokens=wanted.max_tokens)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("failing", ["widen", "join"])
def test_rows_that_run_go_on_as_before_where_others_could_not_join(model_type, failing, monkeypatch):
    model, real, calls = shadow_model(model_type), getattr(joining, failing), []

    def out_of_memory_the_second_time(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return real(*arguments)

    (running, heard), (long, _) = listening(job("robot", 3, 0)), listening(job("robot", 40, 1))
    batch = batches.step(model, batches.prefill(model, [running]))
    fresh = batches.prefill(model, [long])
    monkeypatch.setattr(joining, failing, out_of_memory_the_second_time)
    with pytest.raises(RuntimeError, match="out of memory"):
        batches.merge(batch, fresh)
    monkeypatch.undo()
    assert {cache.layers[0].keys.shape[0] for cache in batch.caches.values()} == {1}
    decode(model, batch)
    assert tokens_of(heard) == reference(model, running.job)


def test_columns_that_no_row_needs_any_more_are_dropped():
    model = shadow_model()
    (long, _), (short, heard) = listening(job("robot", 40, 0, max_tokens=2)), listening(job("home", 3, 1))
    batch = batches.step(model, batches.prefill(model, [long, short]))
    assert batch.mask.shape == (1, 4) and set(batch.caches) == {"base", "shadow:home"}
    assert {cache.get_seq_length() for cache in batch.caches.values()} == {4}
    decode(model, batch)
    assert tokens_of(heard) == reference(model, short.job)


def test_a_seed_draws_the_same_answer_alone_and_in_a_batch():
    model = shadow_model()
    wanted = job("robot", 7, 0, sampling=Sampling(temperature=1.2, top_p=0.9, seed=5))
    answers = []
    for others in ([], [job("home", 20, 1), job("base", 2, 2, sampling=Sampling(temperature=1.0))]):
        row, heard = listening(wanted)
        decode(model, batches.prefill(model, [*(listening(other)[0] for other in others), row]))
        answers.append(tokens_of(heard))
    assert answers[0] == answers[1]


def test_values_that_are_not_finite_end_their_row_alone():
    model = shadow_model()
    with torch.no_grad():
        model.network("home").injections[0].W_up.fill_(float("nan"))
    (bad, heard_bad), (good, heard_good) = listening(job("home", 5, 0)), listening(job("robot", 9, 1))
    decode(model, batches.prefill(model, [bad, good]))
    assert isinstance(heard_bad[-1], ApiError) and heard_bad[-1].status == 500
    assert tokens_of(heard_good) == reference(model, good.job)


# ---------------------------------------------------------------- the worker thread


def collect(scheduler, wanted):
    heard = queue.Queue()
    (row,) = scheduler.submit([wanted], [heard.put])
    return row, heard


def all_of(heard, timeout=120):
    events = []
    while not events or isinstance(events[-1], Piece):
        events.append(heard.get(timeout=timeout))
    return events


@pytest.fixture
def scheduler():
    made = Scheduler(shadow_model(), TOKENIZER, Metrics(), max_batch=4, max_waiting=64)
    yield made
    made.close(30)


def test_requests_from_many_threads_at_random_times_are_not_mixed(scheduler):
    model, names = shadow_model(), list(PATHS)
    jobs = [job(names[i % 5], 1 + i % 13, i, max_tokens=4 + i % 9) for i in range(20)]
    heard = {}

    def ask(i):
        time.sleep(random.Random(i).random() / 20)
        heard[i] = all_of(collect(scheduler, jobs[i])[1])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, wanted in enumerate(jobs):
        assert tokens_of(heard[i]) == reference(model, wanted)


def test_one_answer_too_many_is_refused_and_the_rest_is_served(monkeypatch):
    made = Scheduler(shadow_model(), TOKENIZER, Metrics(), max_batch=1, max_waiting=2)
    first, refused = [], 0
    with held_steps(monkeypatch):  # so that no place becomes free meanwhile
        for i in range(8):
            try:
                first.append(collect(made, job("base", 3, i, max_tokens=40)))
            except ApiError as error:
                assert error.status == 429 and error.retry_after
                refused += 1
    assert refused >= 5 and made._metrics.value("refused_total") == refused
    assert all(isinstance(all_of(heard)[-1], End) for _, heard in first)
    made.close(30)


def test_a_cancelled_answer_leaves_the_batch(scheduler, monkeypatch):
    with held_steps(monkeypatch):
        row, heard = collect(scheduler, job("robot", 3, 0, max_tokens=200))
        heard.get(timeout=120)
        scheduler.cancel([row])
    assert isinstance(all_of(collect(scheduler, job("base", 3, 1))[1])[-1], End)
    assert not any(isinstance(event, End) for event in list(heard.queue))
    assert scheduler._metrics.value("cancelled_total") == 1 and row.num_tokens < 200


def test_an_answer_past_its_deadline_ends_with_a_timeout(scheduler):
    wanted = job("robot", 3, 0, max_tokens=250, deadline=time.monotonic() + 0.05)
    last = all_of(collect(scheduler, wanted)[1])[-1]
    assert isinstance(last, ApiError) and last.status == 504


def test_closing_finishes_what_runs_and_refuses_what_comes(scheduler):
    heard = [collect(scheduler, job("home", 3, i))[1] for i in range(6)]
    scheduler.close(30)
    assert all(isinstance(all_of(one)[-1], End) for one in heard)
    with pytest.raises(ApiError, match="shutting down"):
        collect(scheduler, job("home", 3, 9))


def test_a_model_that_fails_ends_its_rows_and_the_next_request_is_served(scheduler, monkeypatch):
    def explode(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(batches, "step", explode)
    last = all_of(collect(scheduler, job("robot", 3, 0))[1])[-1]
    assert isinstance(last, ApiError) and last.status == 500
    monkeypatch.undo()
    assert isinstance(all_of(collect(scheduler, job("robot", 3, 0))[1])[-1], End)


def test_rows_that_cannot_join_fail_alone(scheduler, monkeypatch):
    def explode(first, second):
        if len(first) and len(second):
            raise RuntimeError("out of memory")
        return first if len(first) else second

    monkeypatch.setattr(batches, "merge", explode)
    with held_steps(monkeypatch):
        running, heard = collect(scheduler, job("robot", 3, 0))
        events = [heard.get(timeout=120)]
        late = collect(scheduler, job("robot", 40, 1))[1]
    failed = all_of(late)[-1]
    assert isinstance(failed, ApiError) and failed.status == 500
    assert tokens_of(events + all_of(heard)) == reference(shadow_model(), running.job)


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_a_long_prompt_waits_until_the_rows_beside_it_may_be_as_long(monkeypatch, num_drafts):
    """Four rows of 15 tokens fill the budget; one of 52 beside a single other would take 104 places of it."""
    rectangles, keep = [], batches.keep

    def watched(batch, rows):  # at the end of every step
        if len(batch):
            rectangles.append(tuple(batch.mask.shape))
        return keep(batch, rows)

    monkeypatch.setattr(batches, "keep", watched)
    made = Scheduler(shadow_model(), TOKENIZER, Metrics(), max_batch=4, max_tokens=60)
    jobs = [job("robot", 40 if i == 2 else 3, i, num_drafts=num_drafts * (i % 2)) for i in range(6)]
    heard = [collect(made, wanted)[1] for wanted in jobs]
    answers = [tokens_of(all_of(one)) for one in heard]
    made.close(30)
    assert answers == [reference(shadow_model(), wanted) for wanted in jobs]
    assert max(rows * width for rows, width in rectangles) <= 60
    assert max(width for _, width in rectangles) > 40 and max(rows for rows, _ in rectangles) > 1


def test_a_row_alone_runs_whatever_its_length():
    made = Scheduler(shadow_model(), TOKENIZER, Metrics(), max_tokens=10)
    heard = [collect(made, job("robot", 20, i))[1] for i in range(2)]
    assert all(isinstance(all_of(one)[-1], End) for one in heard)
    made.close(30)


def test_an_empty_batch_is_neutral():
    batch = Batch()
    assert batches.merge(batch, Batch()) is not None and len(batches.keep(batch, [])) == 0
