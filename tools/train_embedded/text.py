"""The tokenizer, a small BPE trained on the grammar's captions, and the text encoder."""

import random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from .captions import random_scene

VOCABULARY = 384
"""256 bytes, the special tokens, and merges enough to make each word of the grammar a token."""
WIDTH = 128
LAYERS = 3
"""The pipeline reads the output of the last layer but one, so the last never matters."""
SPECIAL = ("<|pad|>", "<|user|>", "<|end|>")
CHAT_TEMPLATE = "{%- for message in messages -%}<|user|>{{ message['content'] }}<|end|>{%- endfor -%}"
MAX_TOKENS = 512
"""What ZImagePipeline pads a prompt to by default."""


def build_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Train the BPE on captions; case and repeated blanks do not matter."""
    rng = random.Random(f"tokenizer {seed}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    captions = (str(random_scene(rng)) for _ in range(5000))
    tokenizer.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        padding_side="right",
        model_max_length=MAX_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def build_text_encoder() -> Qwen3Model:
    """An untrained causal encoder of about half a million parameters."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=MAX_TOKENS,
            tie_word_embeddings=True,
            use_cache=False,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=SPECIAL.index("<|end|>"),
        )
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> tuple[Tensor, Tensor]:
    """What ZImagePipeline feeds its encoder: ids and mask (1 on tokens), both (N, longest)."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )
        for caption in captions
    ]
    encoded = tokenizer(prompts, padding="longest", return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask


def encode_text(encoder: Qwen3Model, ids: Tensor, mask: Tensor) -> Tensor:
    """The hidden states the pipeline reads: (B, L, WIDTH)."""
    out = encoder(input_ids=ids, attention_mask=mask.bool(), output_hidden_states=True)
    return out.hidden_states[-2]


def caption_lengths(mask: Tensor) -> Tensor:
    """Tokens of each caption: (B,) int64."""
    return mask.sum(dim=1).to(torch.int64)
