"""GGUF files, read back tensor by tensor and run by an independent forward pass from the file alone."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from models import randomise, tiny_base, tiny_config, tokens
from shadowpeft import get_shadow_model
from shadowpeft.deploy.gguf import GGUF_FILE, check_gguf, write_gguf
from shadowpeft.deploy.gguf_model import GgufModel
from shadowpeft.deploy.gguf_pieces import piece_scores
from shadowpeft.deploy.gguf_tokenizer import word_rules
from shadowpeft.deploy.packages import ExportError
from shadowpeft.deploy.serve.prompts import text_ids
from shadowpeft.train.data import prompt_ids
from shadowpeft.train.tasks import TASKS

gguf = pytest.importorskip("gguf", reason="gguf is not installed (pip install 'shadowpeft[export]')")


def detached(model_type: str, **fields):
    model = get_shadow_model(tiny_base(model_type, dtype=torch.float32, **fields),
                             tiny_config(adapter_dtype="float32", shadow_num_hidden_layers=2))  # fmt: skip
    randomise(model.network())
    return model.detach()


def forward_from_file(path, ids: torch.Tensor) -> torch.Tensor:
    """A llama / qwen3 pass by llama.cpp's conventions: neighbouring pairs rotate in llama, halves in qwen3."""
    reader = gguf.GGUFReader(path)
    value = lambda key: reader.fields[key].contents()  # noqa: E731
    kind = value("general.architecture")
    of = lambda key: value(f"{kind}.{key}")  # noqa: E731
    weights = {t.name: torch.from_numpy(np.array(t.data)).double() for t in reader.tensors}
    heads, kv_heads, width = of("attention.head_count"), of("attention.head_count_kv"), of("attention.key_length")
    eps = of("attention.layer_norm_rms_epsilon")
    norm = lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w  # noqa: E731
    length = ids.shape[1]
    angles = torch.arange(length)[:, None] / of("rope.freq_base") ** (torch.arange(0, width, 2).double() / width)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def rotate(x):  # [T, heads, width]
        first, second = (x[..., 0::2], x[..., 1::2]) if kind == "llama" else x.chunk(2, -1)
        pair = first * cos - second * sin, first * sin + second * cos
        return torch.stack(pair, -1).flatten(-2) if kind == "llama" else torch.cat(pair, -1)

    x = weights["token_embd.weight"][ids[0]]
    future = torch.full((length, length), -torch.inf).triu(1)
    for index in range(of("block_count")):
        w = {n.split(".", 2)[2]: t for n, t in weights.items() if n.startswith(f"blk.{index}.")}
        h = norm(x, w["attn_norm.weight"])
        q, k, v = (
            (h @ w[f"attn_{n}.weight"].T).view(length, count, width)
            for n, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        if kind == "qwen3":
            q, k = norm(q, w["attn_q_norm.weight"]), norm(k, w["attn_k_norm.weight"])
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / width**0.5 + future
        x = x + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ w["attn_output.weight"].T
        h = norm(x, w["ffn_norm.weight"])
        gate = torch.nn.functional.silu(h @ w["ffn_gate.weight"].T)
        x = x + (gate * (h @ w["ffn_up.weight"].T)) @ w["ffn_down.weight"].T
    return norm(x, weights["output_norm.weight"]) @ weights.get("output.weight", weights["token_embd.weight"]).T


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_forward_pass_from_the_file_alone_gives_the_detached_logits(tmp_path, model_type, tied):
    model = detached(model_type, tie_word_embeddings=tied)
    assert model.config.tie_word_embeddings == tied
    notes = write_gguf(model, tmp_path / "out").notes
    assert notes == ["no tokenizer was given"]
    with torch.no_grad():
        expected = model.double()(tokens(1, 7)).logits[0]
    assert_close(forward_from_file(tmp_path / "out" / GGUF_FILE, tokens(1, 7)), expected, rtol=1e-4, atol=1e-5)


def test_half_precision_halves_matrices_and_keeps_vectors(tmp_path):
    model = detached("llama")
    write_gguf(model, tmp_path / "out", precision="float16")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out" / GGUF_FILE).tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16" and kinds["output_norm.weight"] == "F32"
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ExportError, match=r"blk\.1\.ffn_up\.weight"):
        check_gguf(tmp_path / "out" / GGUF_FILE, model, "float16")


def byte_level(*before) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(["turn on the lights in the kitchen"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")


def test_a_byte_level_vocabulary_is_stored_with_merges_kinds_and_word_rules(tmp_path):
    tokenizer = byte_level(pre_tokenizers.Digits(individual_digits=True))
    model = detached("llama", vocab_size=len(tokenizer))
    assert write_gguf(model, tmp_path / "out", tokenizer=tokenizer).notes == []
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "out" / GGUF_FILE).fields.items()}
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "smollm"
    vocabulary = tokenizer.get_vocab()
    assert fields["tokenizer.ggml.tokens"] == sorted(vocabulary, key=vocabulary.get)
    assert fields["tokenizer.ggml.token_type"][:2] == [gguf.TokenType.CONTROL, gguf.TokenType.NORMAL]
    assert all(len(merge.split(" ")) == 2 for merge in fields["tokenizer.ggml.merges"])
    assert fields["tokenizer.ggml.eos_token_id"] == 0 and fields["tokenizer.ggml.add_bos_token"] is True


def test_rows_of_a_padded_embedding_get_placeholders_and_too_few_rows_are_refused(tmp_path):
    """llama.cpp refuses a file whose vocabulary is not as long as its table of embeddings."""
    tokenizer = byte_level()
    model = detached("qwen3", vocab_size=len(tokenizer) + 3)
    write_gguf(model, tmp_path / "out", tokenizer=tokenizer)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "out" / GGUF_FILE).fields.items()}
    first = len(tokenizer)
    assert fields["tokenizer.ggml.tokens"][first - 1 :] == [
        tokenizer.convert_ids_to_tokens(first - 1),
        *(f"[PAD{number}]" for number in range(first, first + 3)),
    ]
    assert fields["tokenizer.ggml.token_type"][first - 1 :] == [gguf.TokenType.NORMAL, *[gguf.TokenType.UNUSED] * 3]
    with pytest.raises(ExportError, match=f"the vocabulary has {first + 3} tokens, but token_embd.weight {first} rows"):
        check_gguf(tmp_path / "out" / GGUF_FILE, detached("qwen3", vocab_size=first), "float32")
    with pytest.raises(ExportError, match=f"the tokenizer's last id is {first - 1}, .* has {first - 1} rows"):
        write_gguf(detached("qwen3", vocab_size=first - 1), tmp_path / "few", tokenizer=tokenizer)
    assert not (tmp_path / "few").exists()


def test_word_rules_are_recognised_or_left_unnamed():
    byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    assert word_rules(byte) == "gpt-2"
    assert word_rules({"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, byte]}) is None
    assert word_rules({"type": "Metaspace"}) is None and word_rules(None) is None


def test_another_type_and_features_the_format_lacks_are_refused(tmp_path):
    with pytest.raises(ExportError, match="llama, qwen3, not 'gpt2'"):
        write_gguf(detached("gpt2"), tmp_path / "out")
    classifier = get_shadow_model(tiny_base(labels=3), tiny_config(task_type="SEQ_CLS")).detach()
    with pytest.raises(ExportError, match="not for LlamaForSequenceClassification"):
        write_gguf(classifier, tmp_path / "out")
    with pytest.raises(ExportError, match="attention_bias=True"):
        write_gguf(detached("llama", attention_bias=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


TEMPLATES = {  # and whether a prompt begins with BOS
    None: True,
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}": True,
    "{% for m in messages %}{{ m.content }}{% endfor %}": False,
}


def in_llama_cpp(runner: GgufModel, request: dict) -> tuple[int, str]:
    """Tokens of the prompt, and the greedy answer."""
    server, options = runner._server, {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, "cache_prompt": False}
    answer = (server.handle_chat_completions if "messages" in request else server.handle_completions)(request | options)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    choice = answer["choices"][0]
    return answer["usage"]["prompt_tokens"], choice["message"]["content"] if "messages" in request else choice["text"]


def text_of(model, tokenizer, ids: list[int]) -> str:
    given = torch.tensor([ids])
    written = model.generate(given, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, len(ids) :]
    return tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("template", TEMPLATES)
def test_llama_cpp_puts_bos_in_front_where_training_does(tmp_path, template):
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (pip install 'shadowpeft[test]' on Linux)")
    tokenizer, task, text = byte_level(), TASKS["robot"], "turn on the lights"
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    tokenizer.chat_template = template
    model = detached("llama", vocab_size=len(tokenizer))
    write_gguf(model, tmp_path / "out", tokenizer=tokenizer)
    field = gguf.GGUFReader(tmp_path / "out" / GGUF_FILE).fields["tokenizer.ggml.add_bos_token"]
    assert field.contents() is TEMPLATES[template]
    row = dict.fromkeys(task.fields, text)
    ids, prompt = prompt_ids(task, tokenizer, row), task.prompt(row)
    assert (ids[0] == tokenizer.bos_token_id) is TEMPLATES[template]
    request = {"prompt": prompt} if template is None else {"messages": [{"role": "user", "content": prompt}]}
    found = in_llama_cpp(GgufModel(tmp_path / "out", context=128), request)
    assert found == (len(ids), text_of(model, tokenizer, ids))


CHANGES = [
    normalizers.Lowercase(),
    normalizers.Replace("kitchen", "room"),
    normalizers.Prepend(" "),
    normalizers.NFKC(),
    normalizers.Sequence([normalizers.NFC(), normalizers.Sequence([normalizers.Strip()])]),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: type(change).__name__)
def test_a_tokenizer_that_changes_texts_as_llama_cpp_would_not_is_refused(tmp_path, change):
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = change
    model = detached("llama", vocab_size=len(tokenizer))
    name = "Strip" if isinstance(change, normalizers.Sequence) else type(change).__name__
    with pytest.raises(ExportError, match=rf"changes texts before it cuts them \({name}\).*without the tokenizer"):
        write_gguf(model, tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert "give it texts in NFC" in write_gguf(model, tmp_path / "out", tokenizer=tokenizer).notes[0]


SPACE = "\u2581"


def of_pieces(*, has_space: bool) -> PreTrainedTokenizerFast:
    """A BPE as transformers makes it of sentencepiece's file: all pairs that make a piece, piece by piece."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    corpus = ["turn on the lights in the kitchen", "then turn the heating down  again"] * 4
    found.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=80, show_progress=False))
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *bytes_, *sorted(found.get_vocab(), key=found.get_vocab().__getitem__)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (piece[:end], piece[end:])
        for piece in pieces[259:]
        for end in range(1, len(piece))
        if piece[:end] in vocabulary and piece[end:] in vocabulary
    ]
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", SPACE)
    built.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if has_space else replace
    built.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("has_space", [True, False])
def test_llama_cpp_reads_sentencepieces_tokens_as_serving_does(tmp_path, has_space):
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (pip install 'shadowpeft[test]' on Linux)")
    tokenizer = of_pieces(has_space=has_space)
    model = detached("llama", vocab_size=len(tokenizer), tie_word_embeddings=False)
    model.lm_head.weight.data[:259] = 0  # bytes that are no character are written in other ways
    assert write_gguf(model, tmp_path / "out", tokenizer=tokenizer).notes == []
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "out" / GGUF_FILE).fields.items()}
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is has_space
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.BYTE]
    assert fields["tokenizer.ggml.token_type"][:4] == kinds
    runner = GgufModel(tmp_path / "out", context=128)
    for text in ("turn on the lights", "  then  the kitchen ", "Überall 20\u00b0\n", "again</s>the heating", "x"):
        ids = text_ids(tokenizer, text)
        assert in_llama_cpp(runner, {"prompt": text}) == (len(ids), text_of(model, tokenizer, ids))


def test_scores_stand_for_merges_only_where_both_join_the_same():
    model = {"byte_fallback": True, "vocab": dict.fromkeys([*(f"<0x{byte:02X}>" for byte in range(256)), *"abc"], 0)}
    model["vocab"] |= dict.fromkeys(["ab", "bc", "abc"], 0)
    merges = [["a", "b"], ["b", "c"], ["a", "bc"], ["ab", "c"]]
    assert piece_scores(model | {"merges": merges}) == {"ab": 0.0, "bc": -1.0, "abc": -2.0}
    assert piece_scores(model | {"merges": [" ".join(pair) for pair in merges]}) is not None
    assert piece_scores(model | {"merges": merges[:3]}) is None  # llama.cpp would join ab and c all the same
    assert piece_scores(model | {"merges": [merges[2], *merges[:2], merges[3]]}) is None  # one score, two ranks
    assert piece_scores(model | {"merges": merges, "ignore_merges": True}) is None
    assert piece_scores(model | {"merges": merges, "byte_fallback": False}) is None


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_llama_cpp_writes_what_torch_writes(tmp_path, model_type, precision):
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (pip install 'shadowpeft[test]' on Linux)")
    tokenizer = byte_level()
    # A row more than there are tokens, as tables are padded to round numbers.
    model = detached(model_type, vocab_size=len(tokenizer) + 1)
    if precision == "float16":  # what the file holds, so that both read the same weights
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(weight.half().float() if weight.dim() > 1 else weight)
    write_gguf(model, tmp_path / "out", tokenizer=tokenizer, precision=precision)
    runner = GgufModel(tmp_path / "out", context=64)
    for seed in range(4):
        ids = torch.randint(1, len(tokenizer), (1, 6), generator=torch.Generator().manual_seed(seed))
        written = model.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False)[0, 6:]
        expected = tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert runner.generate(ids[0].tolist(), max_new_tokens=10, ignore_end=True) == expected
    with pytest.raises(ExportError, match="refused a prompt of 100 tokens"):
        runner.generate([5] * 100, max_new_tokens=4)
