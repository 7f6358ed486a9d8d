"""Trains the embedded base from nothing: tokenizer, model, card.

`python recipes/base/train.py --data DIR --out DIR`. With `--leave-out trec,clinc150,...` it is a base that has not read these
tasks' texts, which tells how much of a comparison's result comes from their being in the base's own training text.
"""

import argparse
import json
import lzma
import time
from pathlib import Path

import torch
from corpus import bits_per_byte, split_documents, training_stream
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

SEED = 7
VOCAB_SIZE = 4096
CONTEXT = 512
BATCH = 8
END = "<|endoftext|>"
PAD = "<|pad|>"


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model() -> LlamaForCausalLM:
    # Deep and narrow: the shadow's share of a decoding step is about one block in twelve.
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def pack(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[dict]:
    ids: list[int] = []
    for encoded in tokenizer(documents)["input_ids"]:
        ids += [tokenizer.bos_token_id, *encoded]
    rows = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--leave-out", default="", help="sources of text to do without, comma-separated")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=1000, help="of 4,096 tokens; -1: whole epochs")
    parser.add_argument("--work", type=Path, default=Path("runs/base"), help="checkpoints; resumed from if present")
    args = parser.parse_args()

    set_seed(SEED)
    train, held_out = split_documents(args.data, [name for name in args.leave_out.split(",") if name])
    tokenizer = train_tokenizer([text for documents in train.values() for text in documents])
    dataset = pack(tokenizer, training_stream(train, SEED))
    model = build_model()
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters:,} parameters, {len(dataset) * CONTEXT:,} tokens an epoch", flush=True)
    started = time.monotonic()
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.work),
            per_device_train_batch_size=BATCH,
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            weight_decay=0.1,
            adam_beta2=0.95,
            use_cpu=not torch.cuda.is_available(),
            torch_compile=True,  # with bf16 autocast 1.5x on two CPU cores
            bf16=True,
            logging_steps=20,
            save_steps=100,
            save_total_limit=1,
            report_to=[],
            seed=SEED,
            disable_tqdm=True,
        ),
        train_dataset=dataset,
    )
    checkpoints = list(args.work.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=bool(checkpoints) or None)
    minutes = (time.monotonic() - started) / 60

    model.eval().to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    model.float()
    report = {
        "parameters": num_parameters,
        "tokens_seen": trainer.state.global_step * BATCH * CONTEXT,
        "minutes": round(minutes, 1),
        "held_out": {},
    }
    for source, documents in [*held_out.items(), ("all", [d for ds in held_out.values() for d in ds])]:
        raw = "\n".join(documents).encode()
        report["held_out"][source] = {
            "bytes": len(raw),
            "bits_per_byte": round(bits_per_byte(model, tokenizer, documents, context=CONTEXT), 3),
            "xz_bits_per_byte": round(8 * len(lzma.compress(raw, preset=9)) / len(raw), 3),
        }
    (args.out / "training_report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
