"""Drafted answers equal those of the attached model, whatever the shadows draft and whoever shares the batch."""

import asyncio
import random
import time
import warnings
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from deploy.running import held_steps
from deploy.serve.test_scheduler import FAMILIES, TOKENIZER, all_of, collect, job, listening, reference, tokens_of
from deploy.tiny import shadow_model
from shadowpeft.deploy.serve import batch as batches
from shadowpeft.deploy.serve import speculation
from shadowpeft.deploy.serve.catalogue import catalogue
from shadowpeft.deploy.serve.errors import ApiError
from shadowpeft.deploy.serve.metrics import Metrics
from shadowpeft.deploy.serve.mixed import mixed_logits
from shadowpeft.deploy.serve.protocol import CompletionRequest
from shadowpeft.deploy.serve.sampling import Sampling, distribution, draw
from shadowpeft.deploy.serve.scheduler import Scheduler
from shadowpeft.deploy.serve.sequence import End
from shadowpeft.deploy.serve.service import LocalService, Settings
from shadowpeft.generate import SpeculativeFallbackWarning


def drafting(name, length, seed, **options):
    return job(name, length, seed, **{"num_drafts": 3} | options)


class Counts:
    """What the rounds report."""

    def __init__(self):
        self.drafted = self.accepted = 0

    def __call__(self, num_drafted, num_accepted):
        self.drafted += num_drafted
        self.accepted += num_accepted


def decode(model, batch, counts=None):
    while len(batch):
        batch = speculation.step(model, batch, counts or Counts())


def rig(monkeypatch, known, is_right):
    """Makes shadows draft ``known[prompt]``, with another token wherever ``is_right(prompt, place)`` is false."""
    made = {}

    def drafted(logits, best, sequence, drawn_from):
        # Drafts of one round are asked for one after the other, from the same number of tokens.
        before, number = made.get(id(sequence), (None, 0))
        number = number + 1 if before == sequence.num_tokens else 0
        made[id(sequence)] = sequence.num_tokens, number
        place = sequence.num_tokens + number
        right = known[sequence.job.prompt][place]
        return right if is_right(sequence.job.prompt, place) else (right + 1) % logits.shape[-1]

    monkeypatch.setattr(speculation, "_drafted", drafted)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_rows_that_accept_different_numbers_and_join_late_get_the_attached_answer(model_type, monkeypatch):
    model = shadow_model(model_type)
    names = ["robot", "home", "robot", "home", "robot"]
    jobs = [drafting(name, 2 + 6 * i, i, max_tokens=9 + 4 * i, num_drafts=1 + i) for i, name in enumerate(names)]
    known = {wanted.prompt: reference(model, wanted) for wanted in jobs}
    rig(monkeypatch, known, lambda prompt, place: random.Random(17 * len(prompt) + place).random() < 0.7)
    rows = [listening(wanted) for wanted in jobs]
    counts = Counts()
    batch = batches.prefill(model, [rows[3][0], rows[0][0]])
    for others in ([1], [4, 2]):
        batch = speculation.step(model, batch, counts)
        batch = batches.merge(batch, batches.prefill(model, [rows[i][0] for i in others]))
    decode(model, batch, counts)
    for wanted, (_, heard) in zip(jobs, rows, strict=True):
        assert tokens_of(heard) == known[wanted.prompt]
    ends = [heard[-1] for _, heard in rows]
    assert (counts.drafted, counts.accepted) == (sum(e.num_drafted for e in ends), sum(e.num_accepted for e in ends))
    assert counts.drafted > counts.accepted > 10 and len({end.num_accepted for end in ends}) > 2


@pytest.mark.parametrize(("is_right", "num_rounds", "accepted"), [(True, 4, 12), (False, 15, 0)])
def test_a_draft_that_always_or_never_stands_costs_the_rounds_it_should(is_right, num_rounds, accepted, monkeypatch):
    model = shadow_model()
    wanted = drafting("robot", 5, 0, max_tokens=17 if is_right else 16)
    rig(monkeypatch, {wanted.prompt: reference(model, wanted)}, lambda *_: is_right)
    row, heard = listening(wanted)
    batch, rounds, counts = batches.prefill(model, [row]), 0, Counts()
    while len(batch):
        batch, rounds = speculation.step(model, batch, counts), rounds + 1
    # The prompt gives the first token, a round three drafts and one more; nothing is drafted past the end.
    assert (rounds, counts.accepted) == (num_rounds, accepted)
    assert heard[-1] == End(reason="length", num_tokens=wanted.max_tokens, num_drafted=counts.drafted, num_accepted=accepted)


def test_no_draft_lies_past_the_end_of_an_answer():
    model, counts = shadow_model(), Counts()
    (last, _), (other, _) = listening(drafting("robot", 4, 0, max_tokens=2)), listening(drafting("home", 4, 1))
    batch = speculation.step(model, batches.prefill(model, [last, other]), counts)
    assert last.num_drafted == 0 and last.told and other.num_drafted == 3 == counts.drafted
    assert len(batch) == 1


def test_caches_hold_no_column_that_no_row_needs(monkeypatch):
    model = shadow_model()
    jobs = [drafting("robot", 20, 0, max_tokens=40), drafting("home", 4, 1, max_tokens=40)]
    known = {wanted.prompt: reference(model, wanted) for wanted in jobs}
    rig(monkeypatch, known, lambda prompt, place: len(prompt) == 4)
    rows = [listening(wanted)[0] for wanted in jobs]
    batch = batches.prefill(model, rows)
    for _ in range(6):
        batch = speculation.step(model, batch, Counts())
        lengths = [len(row.job.prompt) + row.num_tokens - 1 for row in batch.sequences]
        assert batch.mask.sum(-1).tolist() == lengths and batch.mask.shape[1] == max(lengths)
        assert {cache.get_seq_length() for cache in batch.caches.values()} == {max(lengths)}
        assert batch.mask.diff(dim=-1).min() >= 0  # empty columns are on the left alone
    assert lengths[1] > lengths[0]


def test_an_end_token_and_a_stop_sequence_within_the_drafts_end_the_answer(monkeypatch):
    model = shadow_model()
    plain = drafting("robot", 6, 3, max_tokens=30)
    known = reference(model, plain)
    rig(monkeypatch, {plain.prompt: known}, lambda *_: True)
    for options in ({"ends": (known[6],)}, {"stops": (TOKENIZER.decode(known[6:7]),)}):
        end = known.index(known[6])
        row, heard = listening(drafting("robot", 6, 3, max_tokens=30, **options))
        decode(model, batches.prefill(model, [row]))
        assert tokens_of(heard) == known[: end + 1] and heard[-1].reason == "stop"
        assert heard[-1].num_tokens == end + 1 and heard[-1].num_accepted <= end


def test_a_seed_draws_the_same_answer_alone_and_in_a_batch():
    model = shadow_model("gemma3_text")  # the family whose random shadows are right most often
    sampling = Sampling(temperature=0.3, top_p=0.9, seed=5)
    wanted = drafting("robot", 7, 0, sampling=sampling, max_tokens=24)
    others = [drafting("home", 20, 1), drafting("robot", 2, 2, sampling=Sampling(temperature=1.0), num_drafts=5)]
    answers = []
    for company in ([], others):
        row, heard = listening(wanted)
        decode(model, batches.prefill(model, [*(listening(other)[0] for other in company), row]))
        answers.append((tokens_of(heard), heard[-1]))
    assert answers[0] == answers[1] and answers[0][1].num_accepted > 0


def test_settled_tokens_are_distributed_as_the_attached_models():
    p, q = (torch.tensor(w, dtype=torch.float64) for w in ([0.5, 0.2, 0.2, 0.1], [0.1, 0.6, 0.0, 0.3]))
    sampling, n = Sampling(temperature=1.0, seed=0), 5000
    generator = sampling.generator()
    logits = p.log().expand(3, 4)
    firsts, seconds = torch.zeros(4), torch.zeros(4)
    for _ in range(n):
        drafts = [draw(q, generator), draw(q, generator)]
        settled = speculation.accept_sampled(drafts, [q, q], logits, sampling, generator)
        firsts[settled[0]] += 1
        if len(settled) > 1:
            seconds[settled[1]] += 1
    for counts in (firsts, seconds):
        expected = p * counts.sum()
        # 3 degrees of freedom: chi-square passes 16.3 once in a thousand; the seed is fixed.
        assert float(((counts - expected) ** 2 / expected).sum()) < 16.3
    # A draft stands with probability sum(min(p, q)) = 0.4; 4 standard deviations of n trials.
    assert float(seconds.sum()) / n == pytest.approx(0.4, abs=4 * (0.4 * 0.6 / n) ** 0.5)


@torch.no_grad()
def test_sampled_answers_of_a_whole_batch_are_distributed_as_the_attached_models():
    model, n = shadow_model("gemma3_text"), 600
    sampling = Sampling(temperature=0.05, top_p=0.9)
    jobs = [drafting("robot", 5, 2, max_tokens=3, sampling=replace(sampling, seed=i)) for i in range(n)]
    rows = [listening(wanted) for wanted in jobs]
    counts = Counts()
    decode(model, batches.prefill(model, [row for row, _ in rows]), counts)
    found = torch.bincount(torch.tensor([tokens_of(heard)[1] for _, heard in rows]), minlength=259)

    def after(tokens):
        ids = torch.tensor([[*jobs[0].prompt, *tokens]])
        return distribution(mixed_logits(model, [jobs[0].path], ids, torch.ones_like(ids), {})[0], sampling)

    first = after([])
    expected = n * sum(first[token] * after([token]) for token in first.nonzero().flatten().tolist())
    often = expected >= 5
    pairs = [*zip(found[often].tolist(), expected[often].tolist(), strict=True)]
    pairs.append((found[~often].sum().item(), expected[~often].sum().item()))
    chi_square = sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs if wanted > 0)
    freedom = len(pairs) - 1
    # Mean and standard deviation of a chi-square are f and sqrt(2 f); 4 deviations, and the seeds are fixed.
    assert freedom > 3 and chi_square < freedom + 4 * (2 * freedom) ** 0.5
    assert 0 < counts.accepted < counts.drafted


def test_reported_probabilities_are_the_attached_models(monkeypatch):
    model = shadow_model()
    wanted = drafting("robot", 6, 0, num_top=2)
    rig(monkeypatch, {wanted.prompt: reference(model, wanted)}, lambda prompt, place: place % 3 > 0)
    facts = []
    for advance in (lambda batch: speculation.step(model, batch, Counts()), lambda batch: batches.step(model, batch)):
        row, heard = listening(wanted)
        batch = batches.prefill(model, [row])
        while len(batch):
            batch = advance(batch)
        facts.append([fact for event in heard[:-1] for fact in event.tokens])
    assert [fact.token for fact in facts[0]] == [fact.token for fact in facts[1]]
    logprobs = [torch.tensor([fact.logprob for fact in one]) for one in facts]
    assert_close(*logprobs)


def test_values_that_are_not_finite_end_their_row_alone():
    model = shadow_model()
    (bad, heard_bad), (good, heard_good) = listening(drafting("home", 5, 0)), listening(drafting("robot", 9, 1))
    batch = batches.prefill(model, [bad, good])
    with torch.no_grad():
        model.network("home").injections[0].W_up.fill_(float("nan"))
    decode(model, batch)
    assert isinstance(heard_bad[-1], ApiError) and heard_bad[-1].status == 500
    assert tokens_of(heard_good) == reference(model, good.job)


# ---------------------------------------------------------------- beside other rows, in the worker


@pytest.fixture
def scheduler():
    made = Scheduler(shadow_model(), TOKENIZER, Metrics(), max_batch=6, max_waiting=64)
    yield made
    made.close(30)


def test_drafting_and_plain_rows_run_side_by_side_and_drafts_are_counted_exactly(scheduler):
    model = shadow_model()
    jobs = [
        job(("robot", "home", "base")[i % 3], 2 + i, i, max_tokens=6 + i, num_drafts=4 * (i % 3 < 2 and i % 2))
        for i in range(9)
    ]
    heard = [all_of(collect(scheduler, wanted)[1]) for wanted in jobs]
    for wanted, events in zip(jobs, heard, strict=True):
        assert tokens_of(events) == reference(model, wanted)
        assert (events[-1].num_drafted is None) == (wanted.num_drafts == 0)
    drafted = sum(events[-1].num_drafted or 0 for events in heard)
    accepted = sum(events[-1].num_accepted or 0 for events in heard)
    assert drafted > 0
    assert scheduler._metrics.value("drafted_tokens_total") == drafted
    assert scheduler._metrics.value("accepted_tokens_total") == accepted


def test_a_cancelled_and_a_late_answer_leave_the_drafting_batch(scheduler, monkeypatch):
    with held_steps(monkeypatch):
        row, heard = collect(scheduler, drafting("robot", 3, 0, max_tokens=240))
        heard.get(timeout=120)
        scheduler.cancel([row])
    late = drafting("home", 3, 0, max_tokens=250, deadline=time.monotonic() + 0.05)
    last = all_of(collect(scheduler, late)[1])[-1]
    assert isinstance(last, ApiError) and last.status == 504
    assert isinstance(all_of(collect(scheduler, drafting("robot", 3, 1))[1])[-1], End)
    assert not any(isinstance(event, End) for event in list(heard.queue))
    assert scheduler._metrics.value("cancelled_total") == 1 and row.num_tokens < 240


def test_a_round_that_fails_ends_its_rows_and_the_others_go_on(scheduler, monkeypatch):
    def explode(*_):
        raise RuntimeError("out of memory")

    plain = collect(scheduler, job("home", 3, 0, max_tokens=60))[1]
    plain.get(timeout=120)
    monkeypatch.setattr(speculation, "base_hidden", explode)
    last = all_of(collect(scheduler, drafting("robot", 3, 0))[1])[-1]
    assert isinstance(last, ApiError) and last.status == 500
    monkeypatch.undo()
    assert isinstance(all_of(plain)[-1], End)
    assert isinstance(all_of(collect(scheduler, drafting("robot", 3, 0))[1])[-1], End)


def test_a_server_does_not_draft_in_windows_that_hand_out_all_they_recorded(monkeypatch):
    monkeypatch.setattr("shadowpeft.generate.rollback.CAN_DRAFT_IN_WINDOWS", False)
    request = CompletionRequest(model="robot:speculative", prompt=[5, 6], max_tokens=4)
    drafts = {}
    for model_type in ("mistral", "llama"):
        model = shadow_model(model_type)
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            service = LocalService(model, TOKENIZER, catalogue(model.networks), Settings(num_drafts=3))
        drafts[model_type] = service._job(request, service.entries["robot:speculative"], [5, 6]).num_drafts
        told = [str(each.message) for each in raised if each.category is SpeculativeFallbackWarning]
        assert len(told) == (len(model.networks) if model_type == "mistral" else 0)
        assert all("decodes without speculation" in text and "5.18" in text for text in told)
        asyncio.run(service.close())
    assert drafts == {"mistral": 0, "llama": 3}
