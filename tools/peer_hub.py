"""Stand-ins for the tokenizers and text encoders that diffusers' tests take from the hub.

They are written as a hub cache, so nothing in transformers or diffusers has to be redirected. The vocabularies are made
here and the weights are random: a test that compares with numbers of the real ones fails, patched or not.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

REVISION = "0" * 40
#: what the tokenizers learn their pieces from; it has the words that the tests' prompts have
TEXT = (
    "a painting of a squirrel eating a burger",
    "a different prompt in a sunny park, bad quality, negative",
    "the quick brown fox jumps over the lazy dog, and a cat holds a sign that says hello world",
    "an astronaut riding a horse on mars; a photo of a red car under a blue sky",
)
CLIP = "hf-internal-testing/tiny-random-clip"
T5 = "hf-internal-testing/tiny-random-t5"
GEMMA = "hf-internal-testing/dummy-gemma"
QWEN = "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration"
MISTRAL = "hf-internal-testing/Mistral-Small-3.1-24B-Instruct-2503-only-processor"
#: a chat as the pipelines' text encoders are told it: each message with its role, between two marks
MARKS = ("<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }} "
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    " <|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
#: repository -> class of its text encoder, which has CLIP's tokenizer
ENCODERS = {
    "hf-internal-testing/tiny-sd3-text_encoder": "CLIPTextModelWithProjection",
    "hf-internal-testing/tiny-sd3-text_encoder-2": "CLIPTextModelWithProjection",
    "hf-internal-testing/tiny-clip-text-2": "CLIPTextModel",
    "peft-internal-testing/tiny-clip-text-2": "CLIPTextModel",
}


def write_hub(folder: Path) -> None:
    """Write the cache for HF_HUB_CACHE into `folder`, in place of what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    _write_t5(_snapshot(folder, T5))
    _write_gemma(_snapshot(folder, GEMMA))
    _write_qwen(_snapshot(folder, QWEN))
    _write_mistral(_snapshot(folder, MISTRAL))
    clip = _snapshot(folder, CLIP)
    _write_clip_tokenizer(clip)
    _write_json(clip / "config.json", {"model_type": "clip"})
    for repository, encoder in ENCODERS.items():
        target = _snapshot(folder, repository)
        _write_clip_tokenizer(target)
        _write_clip_encoder(target, encoder)


def _snapshot(folder: Path, repository: str) -> Path:
    root = folder / ("models--" + repository.replace("/", "--"))
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(REVISION)
    snapshot = root / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    return snapshot


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def _write_t5(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=1103,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=5,
        num_heads=4,
        relative_attention_num_buckets=8,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    T5EncoderModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "T5TokenizerFast", "extra_ids": 0, "model_max_length": 512}
    _write_json(folder / "tokenizer_config.json", names | settings)


def _write_gemma(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<bos>", "$A"], special_tokens=[("<bos>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512}
    _write_json(folder / "tokenizer_config.json", names | settings)
    _write_json(folder / "config.json", {"model_type": "gemma"})


def _write_qwen(folder: Path) -> None:
    """One token a word of the pipeline's own prompt, of which the pipeline drops a number of tokens."""
    from diffusers import QwenImagePipeline
    from transformers import Qwen2Tokenizer

    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
    told = QwenImagePipeline(**dict.fromkeys(parts)).prompt_template_encode
    for mark in MARKS:
        told = told.replace(mark, " ")
    learnt = Qwen2Tokenizer().train_new_from_iterator(
        (told, *TEXT), 2000, new_special_tokens=list(MARKS)
    )
    learnt.chat_template = CHAT
    learnt.save_pretrained(folder)
    _write_json(folder / "config.json", {"model_type": "qwen2"})


def _write_mistral(folder: Path) -> None:
    """Its tokenizer alone, which is what a processor is loaded as where it has no other part."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad")}
    special = [*names.values(), *MARKS]
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, **names)
    fast.save_pretrained(folder)
    _write_json(folder / "config.json", {"model_type": "mistral"})


def _write_clip_tokenizer(folder: Path) -> None:
    """One token a letter. The end of text is the last id, where CLIP's pooling looks for it."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    start, end = "<|startoftext|>", "<|endoftext|>"
    pieces = [*letters, *(letter + "</w>" for letter in letters), start, end]
    _write_json(folder / "vocab.json", {piece: index for index, piece in enumerate(pieces)})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    names = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    _write_json(folder / "tokenizer_config.json", names | settings)


def _write_clip_encoder(folder: Path, encoder: str) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=5,
        vocab_size=1000,
        hidden_act="gelu",
        projection_dim=32,
    )
    getattr(transformers, encoder)(config).save_pretrained(folder)
