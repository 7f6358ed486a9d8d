"""A tiny random shadow model with a byte-level tokenizer, for everything that serves."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from models import randomise, tiny_base, tiny_config
from shadowpeft import ShadowModel, get_shadow_model

VOCAB = 259


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; 0-2 are special."""
    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    built = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def shadow_model(model_type: str = "llama", adapters: tuple[str, ...] = ("robot", "home"), **sizes) -> ShadowModel:
    """A float64 base with one randomised adapter for each name; the second has two shadow blocks."""
    base = tiny_base(model_type, vocab_size=VOCAB, max_position_embeddings=256, **sizes)
    model = get_shadow_model(base, tiny_config(), adapters[0])
    for number, name in enumerate(adapters[1:], start=2):
        model.add_adapter(name, tiny_config(shadow_num_hidden_layers=number))
    for number, name in enumerate(adapters):
        randomise(model.network(name), seed=number + 1)
    return model.eval()
