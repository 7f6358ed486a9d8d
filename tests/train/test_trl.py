"""TRL's trainers on a shadow model."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import TrainerCallback

from models import randomise, tiny_base, tiny_config
from shadowpeft import ShadowModel, get_shadow_model
from shadowpeft.errors import AdapterError, ConfigError
from workbench import WORDS, byte_tokenizer

trl = pytest.importorskip("trl", reason="trl is not installed (pip install 'shadowpeft[trl]')")
datasets = pytest.importorskip("datasets", reason="datasets is not installed (pip install 'shadowpeft[hub]')")
peers = pytest.importorskip("shadowpeft.train.trl_trainers", exc_type=ImportError)

# TRL 1.16 sets them by the names that transformers 5.23 replaced.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

# Rows of 5 to 7 tokens.
ROWS = [
    {"prompt": "the " * (n % 3) + text.rsplit(" ", 1)[0], "completion": " " + text.rsplit(" ", 1)[1]}
    for n, text in enumerate(WORDS[:12])
]
PAIRS = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " purple" * (1 + n % 2)} for n, row in enumerate(ROWS)
]


def test_a_reference_that_shares_the_models_weights_cannot_follow_it(tmp_path):
    """TRL would mix each weight of the base with itself, in place."""
    with pytest.raises(ConfigError, match="sync_ref_model=True moves the reference's weights"):
        peers.ShadowDPOTrainer(adapted(), args=settings(tmp_path, trl.DPOConfig, sync_ref_model=True))


def adapted(*, seed=1, model_type="llama", **config):
    base = tiny_base(model_type, dtype=torch.float32, vocab_size=320, max_position_embeddings=128)
    model = get_shadow_model(base, tiny_config(adapter_dtype="float32", **config))
    randomise(model.network(), seed=seed)
    return model


def settings(tmp_path, config=None, **own):
    given = {"per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3, "save_strategy": "no"}
    return (config or trl.SFTConfig)(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, **given | own,
    )  # fmt: skip


def sft(model, tmp_path, **own):
    return peers.ShadowSFTTrainer(
        model,
        args=settings(tmp_path, **own),
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=byte_tokenizer(),
    )


def dpo(model, tmp_path, **own):
    return peers.ShadowDPOTrainer(
        model,
        args=settings(tmp_path, trl.DPOConfig, **own),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=byte_tokenizer(),
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_hand(model, rows):
    """Sum of main and weighted shadow loss over the completions of all rows, each run alone, over their tokens."""
    tokenizer, total, count = byte_tokenizer(), 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        total = total + model(torch.tensor([prompt + answer]), labels=labels, num_items_in_batch=1).loss
        count += len(answer)
    return total / count


class Gradients(TrainerCallback):
    """Keeps the gradients in front of the first optimizer step."""

    def __init__(self):
        self.seen = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.seen:
            self.seen = {name: p.grad.clone() for name, p in model.network().named_parameters()}


def assert_same_gradients(found, model):
    expected = {name: p.grad for name, p in model.network().named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        # Sums of about a hundred float32 terms in another order.
        assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_sft_on_completions_has_the_loss_and_gradients_of_separate_rows(tmp_path, packing, checkpointing):
    model = adapted(shadow_dropout=0.0, auxiliary_loss_weight=0.5)
    alone = copy.deepcopy(model).train()
    expected = by_hand(alone, ROWS)
    expected.backward()
    trainer = sft(
        model,
        tmp_path,
        packing=packing,
        max_length=24,
        per_device_train_batch_size=1 if packing else 3,
        gradient_accumulation_steps=4,
        max_steps=1,
        max_grad_norm=0.0,
        gradient_checkpointing=checkpointing,
    )
    num_packs = len(trainer.train_dataset)
    assert (1 < num_packs <= 4) if packing else num_packs == len(ROWS), "one step takes all rows"
    kept = Gradients()
    trainer.add_callback(kept)
    trainer.train()
    assert_close(losses(trainer), [expected.item()], rtol=1e-5, atol=0.0)
    assert_same_gradients(kept.seen, alone)
    parts = trainer.state.log_history[0]
    assert_close(parts["main_loss"] + 0.5 * parts["shadow_loss"], expected.item(), rtol=0.0, atol=1e-4)  # four digits


def test_sft_trains_saves_the_adapter_alone_and_goes_on_from_its_checkpoint(tmp_path):
    own = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "packing": True, "max_length": 32}
    whole = sft(adapted(), tmp_path, **own)
    whole.train()
    again = sft(adapted(seed=5), tmp_path, **own)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(whole), "the log of the first half comes with the checkpoint"
    for name, weight in whole.model.network().named_parameters():
        assert torch.equal(weight, again.model.network().get_parameter(name)), name
    folder = tmp_path / "checkpoint-4"
    assert (folder / "shadow_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    base = adapted().unload()
    loaded = ShadowModel.from_pretrained(folder, base)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert_close(loaded(ids).logits, whole.model.eval()(ids).logits, rtol=0.0, atol=0.0)


def test_evaluation_during_sft_scores_both_losses(tmp_path):
    model = adapted(shadow_dropout=0.0)
    trainer = sft(model, tmp_path, per_device_eval_batch_size=12)
    rows = trainer.train_dataset
    found = trainer.evaluate(rows)["eval_loss"]
    assert_close(found, by_hand(model.eval(), ROWS).item(), rtol=1e-5, atol=0.0)


def log_probability(model, row, answer, *, base=False):
    tokenizer = byte_tokenizer()
    prompt = tokenizer(row["prompt"])["input_ids"]
    ids = tokenizer(row["prompt"] + row[answer])["input_ids"] + [tokenizer.eos_token_id]
    logits = model(torch.tensor([ids]), adapter="__base__" if base else None).logits[0, :-1].log_softmax(-1)
    return logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])][len(prompt) - 1 :].sum()


@pytest.mark.parametrize("precomputed", [False, True], ids=["each step", "precomputed"])
def test_dpo_takes_the_disabled_adapter_as_its_reference(tmp_path, precomputed):
    """The loss of Rafailov et al. (2023), Eq. 7, by hand, dropout off although the shadow has some."""
    model = adapted(shadow_dropout=0.3)
    alone = copy.deepcopy(model).eval()
    terms = []
    for row in PAIRS:
        gain = [
            log_probability(alone, row, answer) - log_probability(alone, row, answer, base=True).detach()
            for answer in ("chosen", "rejected")
        ]
        terms.append(-torch.nn.functional.logsigmoid(0.1 * (gain[0] - gain[1])))
    expected = torch.stack(terms).mean()
    expected.backward()
    before = {name: weight.clone() for name, weight in model.base.state_dict().items()}
    trainer = dpo(
        model, tmp_path, beta=0.1, max_steps=1, per_device_train_batch_size=6, gradient_accumulation_steps=2,
        max_grad_norm=0.0, precompute_ref_log_probs=precomputed,
    )  # fmt: skip
    kept = Gradients()
    trainer.add_callback(kept)
    trainer.train()
    assert_close(losses(trainer), [expected.item()], rtol=1e-5, atol=0.0)
    assert_same_gradients(kept.seen, alone)
    assert all(torch.equal(weight, before[name]) for name, weight in model.base.state_dict().items())


def test_dpo_prefers_what_was_chosen_after_a_few_steps_and_the_adapter_loads(tmp_path):
    trainer = dpo(adapted(shadow_dropout=0.0), tmp_path, max_steps=12, learning_rate=1e-2, save_strategy="steps", save_steps=12)
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert len(margins) == 12 and margins[-1] > margins[0] + 0.1
    loaded = ShadowModel.from_pretrained(tmp_path / "checkpoint-12", adapted().unload())
    ids = torch.tensor([[5, 6, 7, 8]])
    assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, rtol=0.0, atol=0.0)


def test_what_these_trainers_cannot_do_is_refused(tmp_path):
    base = tiny_base(dtype=torch.float32, vocab_size=320)
    with pytest.raises(AdapterError, match="expected a causal language model with a shadow, not LlamaForCausalLM"):
        sft(base, tmp_path)
    with pytest.raises(AdapterError, match="get_shadow_model"):
        dpo(base, tmp_path)
    with pytest.raises(ConfigError, match="loss_type='dft'"):
        sft(adapted(), tmp_path, loss_type="dft")
    with pytest.raises(ConfigError, match="packed rows are told apart by sdpa and flash attention, not by 'eager'"):
        sft(adapted(model_type="gemma2"), tmp_path, packing=True, max_length=64)


def test_trl_as_it_comes_does_not_train_a_base_without_its_shadow(tmp_path):
    """Why there are classes for it: the fused head of TRL 1.16 would score the base."""
    trainer = trl.SFTTrainer(
        adapted(), settings(tmp_path), train_dataset=datasets.Dataset.from_list(ROWS), processing_class=byte_tokenizer()
    )
    with pytest.raises(AttributeError, match="last_hidden_state"):
        trainer.train()
