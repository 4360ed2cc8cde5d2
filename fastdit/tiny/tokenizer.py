"""The word-level tokenizer of the tiny model.

Lower-cases, splits at spaces, hyphens and punctuation, and maps words outside the caption
vocabulary to ``<unk>``, so any prompt can be typed. It is built from the vocabulary in
``captions.py`` and trained on nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .captions import VOCABULARY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# CLIPTextModel treats an end mark of id 2 as a legacy special case, so the end mark is 3.
SPECIAL: dict[str, int] = {"<pad>": 0, "<bos>": 1, "<unk>": 2, "<eos>": 3}


def vocabulary(words: tuple[str, ...] = VOCABULARY) -> dict[str, int]:
    """Token ids are those of four special marks, then of the caption words in alphabetical order."""
    return {**SPECIAL, **{word: len(SPECIAL) + i for i, word in enumerate(words)}}


def build_tokenizer(
    max_tokens: int = 24, words: tuple[str, ...] = VOCABULARY
) -> PreTrainedTokenizerFast:
    """This builds the tokenizer.

    Parameters
    ----------
    max_tokens : int
        Length to which prompts are padded or cut, begin and end marks included.
    words : tuple of str
        The vocabulary, in alphabetical order.

    Returns
    -------
    PreTrainedTokenizerFast
        Adds ``<bos>`` and ``<eos>``, pads with ``<pad>``.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(vocabulary(words), unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[-_]"), " ")]
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        special_tokens=[("<bos>", SPECIAL["<bos>"]), ("<eos>", SPECIAL["<eos>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=max_tokens,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
