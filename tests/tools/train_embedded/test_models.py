from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor

from tools.train_embedded import text
from tools.train_embedded.captions import COLOURS, RELATIONS, SHAPES
from tools.train_embedded.data import training_pictures
from tools.train_embedded.latents import CHANNELS, compute_basis
from tools.train_embedded.transformer import (
    RealRotation,
    build_transformer,
    forward_batch,
    initialize,
)

LONGEST = "a small orange circle right of a large purple triangle on a white background"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return text.build_tokenizer()


def test_each_word_is_one_token(tokenizer: Any) -> None:
    words = [*COLOURS, *SHAPES, *" ".join(RELATIONS).split(), "a", "an", "small", "background"]
    for word in words:
        assert len(tokenizer(word).input_ids) == 1, word


def test_the_longest_caption_fits_the_transformer_s_padding(tokenizer: Any) -> None:
    ids, mask = text.tokenize(tokenizer, [LONGEST, ""])
    assert ids.shape[1] <= 32
    assert mask.sum(dim=1).tolist() == [len(LONGEST.split()) + 2, 2]


def test_case_and_blanks_do_not_matter(tokenizer: Any) -> None:
    ids, _ = text.tokenize(tokenizer, ["A  RED circle", "a red circle"])
    assert ids[0].equal(ids[1])


def test_training_s_forward_is_the_stock_one(tokenizer: Any) -> None:
    torch.manual_seed(0)
    model, encoder = build_transformer().eval(), text.build_text_encoder().eval()
    initialize(model)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    ids, mask = text.tokenize(tokenizer, ["a red circle", LONGEST])
    latents, time = torch.randn(2, CHANNELS, 16, 16), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        features = text.encode_text(encoder, ids, mask)
        captions = [f[m.bool()] for f, m in zip(features, mask, strict=True)]
        stock = model(list(latents.unsqueeze(2)), time, captions, return_dict=False)[0]
        assert isinstance(model.layers[0].attention.processor, ZSingleStreamAttnProcessor)
        for block in [*model.noise_refiner, *model.context_refiner, *model.layers]:
            block.attention.set_processor(RealRotation())
        ours = forward_batch(model, latents, time, features, mask)
    assert torch.allclose(torch.stack(list(stock)).squeeze(2), ours, atol=1e-4)


def test_latents_are_normalized() -> None:
    pictures, _ = training_pictures(60, seed=0)
    latents = compute_basis(pictures).encode(pictures)
    assert latents.shape == (60, CHANNELS, 16, 16)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert latents.var() == pytest.approx(1.0, abs=0.02)
