"""Tiny tokenizers with the normalisers, pre-tokenizers and decoders of well-known families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.text.small_tokenizers import CORPUS, read_bpe

_TEXTS = [
    *CORPUS,
    "Le café était déjà fermé, naïve façade, Ångström über straße.",
    "한국어 문장 각 값 テキスト データ 漢字 株式会社",
    "office ﬁne ﬂow \uff21\uff22\uff23 ①②③ x² ½ … ﷺ",
    "The cat said: Hôtel x² 3, and hôtel.",
    "👩‍👩‍👧 ❤️ 🇩🇪 ไทย हिन्दी क्षि عربي",
] * 3
_CHAT = ["<|start|>", "<|end|>"]
_SPLIT = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(normalizer: Any = None, *, bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_SPLIT, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _TEXTS,
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<s>", *_CHAT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, _bos()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def llama3() -> PreTrainedTokenizerFast:
    return _byte_level(bos=True)


def qwen() -> PreTrainedTokenizerFast:
    return _byte_level(normalizers.NFC())


def _bos() -> Any:
    return processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )


def _sentencepiece_bpe(
    normalizer: Any, pre_tokenizer: Any, *, strip: bool, rstrip: bool = False
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    tokenizer.train_from_iterator(
        _TEXTS,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<unk>", "<s>"],
            limit_alphabet=90,  # The rest goes to bytes.
            show_progress=False,
        ),
    )
    vocabulary, merges = read_bpe(tokenizer.model.__getstate__())
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    tokenizer.model = models.BPE(
        vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True
    )
    tokenizer.add_special_tokens(
        [AddedToken("<s>"), *[AddedToken(t, rstrip=rstrip) for t in _CHAT]]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>", unk_token="<unk>"
    )


_LLAMA2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def llama2() -> PreTrainedTokenizerFast:
    return _sentencepiece_bpe(_LLAMA2, None, strip=True)


def phi3() -> PreTrainedTokenizerFast:
    """Its tokens around turns swallow the blanks behind them."""
    return _sentencepiece_bpe(_LLAMA2, None, strip=True, rstrip=True)


def mistral() -> PreTrainedTokenizerFast:
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _sentencepiece_bpe(None, metaspace, strip=True)


def gemma() -> PreTrainedTokenizerFast:
    return _sentencepiece_bpe(
        normalizers.Replace(" ", "▁"),
        pre_tokenizers.Split(" ", "merged_with_previous"),
        strip=False,
    )


def bert() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        _TEXTS,
        trainers.WordPieceTrainer(
            vocab_size=400,
            special_tokens=["[UNK]", "[CLS]", "[SEP]", *_CHAT],
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def _unigram(normalizer: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(
        _TEXTS,
        trainers.UnigramTrainer(
            vocab_size=400,
            special_tokens=["<unk>", "<s>", *_CHAT],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def t5() -> PreTrainedTokenizerFast:
    blanks = normalizers.Replace(Regex(" {2,}"), " ")
    return _unigram(normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), blanks]))


def albert() -> PreTrainedTokenizerFast:
    return _unigram(
        normalizers.Sequence(
            [
                normalizers.Replace("``", '"'),
                normalizers.NFKD(),
                normalizers.StripAccents(),
                normalizers.Lowercase(),
                normalizers.Strip(),
            ]
        )
    )


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    make.__name__: make for make in (llama3, qwen, llama2, phi3, mistral, gemma, bert, t5, albert)
}
