"""Methods that rank the sentences of a context, beside those of the token benchmark."""

from __future__ import annotations

import importlib.util
import math
import re
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.faithfulness.baselines import AblationFamily, spread
from benchmarks.faithfulness.example import Family, Prepared, Scores, Span, Values
from benchmarks.faithfulness.hf import HFModel, all_cores
from benchmarks.faithfulness.ours import VARIANTS, OursFamily, Variant

_OWN_VARIANTS = {
    "flashtrace-k0-predicting": (
        Variant(0, predicting=True),
        "no hop, from the rows that predict the output's tokens",
    ),
    "flashtrace-auto-predicting-surprise": (
        Variant("auto", predicting=True, surprise=True),
        "hops as auto, from the rows that predict, weighted by -log p",
    ),
    "flashtrace-auto-predicting": (
        Variant("auto", predicting=True),
        "hops as auto, from the rows that predict the output's tokens",
    ),
    "flashtrace-auto-through": (
        Variant("auto", through=True),
        "hops as auto, also through the question and the template",
    ),
    "flashtrace-auto-predicting-through": (
        Variant("auto", predicting=True, through=True),
        "hops as auto, also through the question and the template, from the rows that predict",
    ),
    "flashtrace-auto-surprise-skip": (
        Variant("auto", skip="punctuation", surprise=True),
        "hops as auto, no punctuation, tokens of the output weighted by -log p",
    ),
}


class OwnFamily(OursFamily):
    """FlashTrace, and variants in what it explains."""

    variants: ClassVar[Mapping[str, tuple[Variant, str]]] = {**VARIANTS, **_OWN_VARIANTS}
    labels = {name: label for name, (_, label) in variants.items()}  # noqa: RUF012


class CutFamily(AblationFamily):
    """Leave-one-out and ContextCite as their authors have it: what is left out is cut out."""

    def without(self, prepared: Prepared, removed: Sequence[npt.NDArray[np.int64]]) -> list[float]:
        """Log-probability (nats) of the response without these sentences, by their numbers."""
        spans = [[prepared.sentences[i] for i in numbers] for numbers in removed]
        return self._logprobs(prepared, spans)

    def _logprobs(self, prepared: Prepared, removed: Sequence[Sequence[Span]]) -> list[float]:
        sequences = []
        for spans in removed:
            gone = {position for span in spans for position in range(*span)}
            sequences.append([t for i, t in enumerate(prepared.token_ids) if i not in gone])
        lengths = [prepared.response_length] * len(sequences)
        return self._scorer.response_logprobs(sequences, lengths)


_WORD = re.compile(r"\w+")
_K1, _B = 1.5, 0.75


def words(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return _WORD.findall(text.lower())


def bm25(query: Sequence[str], sentences: Sequence[Sequence[str]]) -> Values:
    """Okapi BM25 of each sentence, the sentences being the collection (Robertson & Zaragoza 2009).

    Args:
        query: Words.
        sentences: Words of each sentence.
    """
    count = len(sentences)
    mean = sum(map(len, sentences)) / count
    found = Counter(word for sentence in sentences for word in set(sentence))
    scores = np.zeros(count)
    for word in set(query):
        weight = math.log(1 + (count - found[word] + 0.5) / (found[word] + 0.5))
        for i, sentence in enumerate(sentences):
            times = sentence.count(word)
            scores[i] += (
                weight * times * (_K1 + 1) / (times + _K1 * (1 - _B + _B * len(sentence) / mean))
            )
    return scores


class Embedder:
    """Texts as the mean of their tokens' vectors, of length 1; the package ``wordllama`` has them.

    Its files are read, and none of its code is run: that looks for them on the internet.
    """

    def __init__(self) -> None:
        """Loads the model.

        Raises:
            ModuleNotFoundError: The package is not installed.
        """
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        spec = importlib.util.find_spec("wordllama")
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError("the baseline 'embedding' needs the package wordllama")
        folder = Path(spec.submodule_search_locations[0])
        [weights] = folder.glob("weights/*_256.safetensors")
        [tokenizer] = folder.glob("tokenizers/*.json")
        [self._vectors] = load_file(weights).values()
        self._tokenizer = Tokenizer.from_file(str(tokenizer))

    def embed(self, text: str) -> Values:
        """A vector of length 1, or of 0 where the text has no token."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not ids:
            return np.zeros(self._vectors.shape[1])
        mean = self._vectors[ids].astype(np.float64).mean(axis=0)
        return mean / np.linalg.norm(mean)


class WordFamily(Family):
    """Baselines that look at words alone; the query is the question and the whole response."""

    labels: Mapping[str, str] = {
        "question-overlap": "share of a sentence's words that stand in question or response",
        "bm25": "BM25 of the sentence for question and response",
        "embedding": "cosine of word embeddings (wordllama) with question and response",
    }

    def __init__(self, resources: Any) -> None:
        """Takes ``resources.questions``, by the id of the example."""
        self._questions: Mapping[str, str] = resources.questions

    @cached_property
    def _embedder(self) -> Embedder:
        return Embedder()

    def attribute(self, prepared: Prepared, names: Collection[str]) -> dict[str, Scores]:
        """See `Family`."""
        example = prepared.example
        asked = f"{self._questions[example.id]} {example.reasoning} {example.output}"
        texts = ["".join(prepared.texts[a:b]).strip() for a, b in prepared.sentences]
        query, sentences = words(asked), [words(text) for text in texts]
        if "embedding" in names:
            _ = self._embedder  # No example pays for loading it.
        results = {}
        for name in names:
            began = time.perf_counter()
            if name == "bm25":
                found = bm25(query, sentences)
            elif name == "embedding":
                own, *others = map(self._embedder.embed, (asked, *texts))
                found = np.array([float(own @ other) for other in others])
            else:
                shares = [sum(w in query for w in own) / max(1, len(own)) for own in sentences]
                found = np.array(shares)
            lengths = np.array([end - start for start, end in prepared.sentences])
            values = spread(found * lengths, prepared.sentences, prepared.user)
            results[name] = Scores(values, time.perf_counter() - began)
        return results


class LogitDirectionFamily(Family):
    """What each token's values add to the logit of the output's tokens, without later layers."""

    labels: Mapping[str, str] = {
        "logit-direction": "what attention brings from a token, along the answer's logits (signed)",
    }

    def __init__(self, resources: Any) -> None:
        """Takes the model from ``resources.hf``."""
        self._hf: HFModel = resources.hf

    def attribute(self, prepared: Prepared, names: Collection[str]) -> dict[str, Scores]:
        """See `Family`."""
        if not names:
            return {}
        recorded = self._hf.recorded(prepared)
        with all_cores(), torch.no_grad():
            began = time.perf_counter()
            scores = logit_directions(self._hf, recorded, prepared)
            seconds = recorded.seconds + time.perf_counter() - began
        values = scores.double().numpy()[slice(*prepared.user)]
        return {"logit-direction": Scores(values, seconds)}


def logit_directions(hf: HFModel, recorded: Any, prepared: Prepared) -> torch.Tensor:
    """``sum_{l,h,i} alpha_ij v_j^h M_h u_i`` over the rows ``i`` that predict the output, ``[N]``.

    ``u_i`` is the unembedding of the token that row ``i`` predicts, through the final norm with
    the row's own factor, less the mean unembedding of the vocabulary.
    """
    first, end = prepared.target
    rows = torch.arange(first - 1, end - 1)
    head = hf.model.lm_head.weight.float()
    tokens = torch.tensor(prepared.token_ids[first:end])
    norm = hf.model.model.norm
    stream = _final_stream(hf, prepared)[rows]
    factor = torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    directions = (head[tokens] - head.mean(0)) * norm.weight.float() * factor  # [R, D]
    scores = torch.zeros(len(prepared.token_ids))
    for layer in recorded.layers:
        projected = torch.einsum("rD,hdD->hrd", directions, layer.projection.weight)
        shared = len(projected) // layer.values.shape[1]
        values = layer.values.transpose(0, 1).repeat_interleave(shared, dim=0)  # [H, N, d]
        gains = projected @ values.transpose(1, 2)  # [H, R, N]
        scores += (gains * layer.attention[:, rows]).sum((0, 1))
    return scores


def _final_stream(hf: HFModel, prepared: Prepared) -> torch.Tensor:
    taken: list[torch.Tensor] = []

    def hook(_: Any, args: Any) -> None:
        taken.append(args[0][0].float())

    handle = hf.model.model.norm.register_forward_pre_hook(hook)
    try:
        with hf.fused_attention():
            hf.model.model(input_ids=torch.tensor([prepared.token_ids]), use_cache=False)
    finally:
        handle.remove()
    return taken[0]


def attention_by_sentence(ft: Any, prepared: Prepared) -> tuple[npt.NDArray[np.float64], float]:
    """Mean attention of the rows that predict the output's tokens, and the seconds it took.

    The prefill of the sequence is not in the seconds.

    Args:
        ft: The product's offline class.
        prepared: The example.

    Returns:
        ``[sentences, L * H]``.
    """
    from vllm import SamplingParams, TokensPrompt

    boundary = prepared.prompt_length
    span = [position - boundary for position in prepared.target]
    ids = list(prepared.token_ids)
    field = {
        "target": {"tokens": [span]},
        "reasoning": "none",
        "rows": "predicting",
        "skip_tokens": "none",
        "hops": 0,
        "top_k": 1,
        "include": ["attention"],
    }
    prompt = TokensPrompt(prompt_token_ids=ids)
    ft.llm.generate([prompt], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    began = time.perf_counter()
    sums = ft.attribute(ids[:boundary], ids[boundary:], field).attention.double()
    seconds = time.perf_counter() - began
    own = [sums[:, :, start:end].sum(-1).flatten().numpy() for start, end in prepared.sentences]
    return np.stack(own), seconds
