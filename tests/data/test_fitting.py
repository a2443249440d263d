"""Model and tokenizer brought together: as long as the model takes, padded by one token."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rankopt.data.fitting import fit_batches, fit_length, fit_padding
from rankopt.errors import DataError, ModelError
from rankopt.model.loading import load_tokenizer, longest_input
from tests import tiny


def made(name: str, **settings: Any) -> Any:
    import transformers

    stem = re.sub("(For[A-Z]|LMHead).*", "", name)
    config = getattr(transformers, f"{stem}Config")(vocab_size=64, **settings)
    return getattr(transformers, name)(config).eval()


_ENCODER = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 12}  # fmt: skip
_BART = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8,
         "max_position_embeddings": 12}  # fmt: skip
_GPT = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 12}


@pytest.mark.parametrize(
    ("name", "settings", "longest"),
    [
        ("BertForSequenceClassification", _ENCODER, 12),
        ("RobertaForSequenceClassification", {**_ENCODER, "pad_token_id": 1}, 10),
        ("XLMRobertaForSequenceClassification", {**_ENCODER, "pad_token_id": 3}, 8),
        ("MPNetForSequenceClassification", {**_ENCODER, "pad_token_id": 1}, 10),
        ("EsmForSequenceClassification", {**_ENCODER, "pad_token_id": 1}, 10),
        ("NystromformerForSequenceClassification", _ENCODER, 12),
        ("BartForCausalLM", {**_BART, "is_decoder": True}, 12),
        ("OPTForCausalLM", {**_ENCODER, "ffn_dim": 8, "word_embed_proj_dim": 8}, 12),
        ("GPT2LMHeadModel", _GPT, 12),
        ("OpenAIGPTLMHeadModel", _GPT, 12),
        ("MptForCausalLM", {"d_model": 8, "n_layers": 1, "n_heads": 2, "max_seq_len": 12}, 12),
    ],
)
def test_longest_input_is_the_longest_that_runs(
    name: str, settings: dict[str, Any], longest: int
) -> None:
    model = made(name, **settings)
    assert longest_input(model) == longest
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))


def test_relative_positions_have_no_limit() -> None:
    relative = {"relative_attention": True, "position_biased_input": False,
                "pos_att_type": ["p2c", "c2p"]}  # fmt: skip
    model = made("DebertaV2ForSequenceClassification", **_ENCODER, **relative)
    assert longest_input(model) is None
    model(input_ids=torch.full((1, 40), 5))
    assert longest_input(tiny.t5()) is None


def test_length_is_what_model_and_tokenizer_allow() -> None:
    tokenizer = tiny.tokenizer()
    assert fit_length(tiny.roberta(), tokenizer, None) == 63
    assert fit_length(tiny.roberta(), tokenizer, 63) == 63
    with pytest.raises(DataError, match="max_length=64: the model takes at most 63 tokens"):
        fit_length(tiny.roberta(), tokenizer, 64)
    assert fit_length(tiny.t5(), tokenizer, None) == 256
    tokenizer.model_max_length = 100
    assert fit_length(tiny.t5(), tokenizer, None) == 100


@pytest.mark.parametrize("given", [None, -1, 99, 5])
def test_classifier_finds_the_last_token_whatever_pads(given: int | None) -> None:
    """Padded rows have the logits that they have alone."""
    model = made("GPT2ForSequenceClassification", **_GPT, num_labels=2)
    model.config.pad_token_id = given
    tokenizer = tiny.tokenizer()
    rows = ["the cat sees", "dog"]
    batch = dict(tokenizer(rows, padding=True, return_tensors="pt"))
    fit_padding(model, tokenizer, 2)
    (ready,) = fit_batches(model, tokenizer, [batch])
    assert model.config.pad_token_id == (5 if given == 5 else tokenizer.pad_token_id)
    with torch.no_grad():
        alone = [model(**tokenizer(row, return_tensors="pt")).logits for row in rows]
        torch.testing.assert_close(model(**ready).logits, torch.cat(alone))


def test_padding_that_nobody_knows_is_refused() -> None:
    model, tokenizer = made("GPT2ForSequenceClassification", **_GPT), tiny.tokenizer()
    model.config.pad_token_id = tokenizer.pad_token = None
    with pytest.raises(DataError, match=r"neither the tokenizer nor the model.*batch_size=1"):
        fit_padding(model, tokenizer, 2)
    fit_padding(model, tokenizer, 1)


def test_tokens_and_types_without_an_embedding_are_named() -> None:
    tokenizer, model = tiny.tokenizer(), tiny.bert()
    ids = torch.tensor([[3, 14]])
    assert fit_batches(model, tokenizer, [{"input_ids": ids}])[0]["input_ids"].equal(ids)
    model.resize_token_embeddings(14)
    with pytest.raises(
        DataError, match=r"gives token 14 \('under'\), the model's embedding has 14"
    ):
        fit_batches(model, tokenizer, [{"input_ids": ids}])
    kinds = {"input_ids": ids - 3, "token_type_ids": torch.tensor([[0, 2]])}
    with pytest.raises(DataError, match="gives token type 2, the model has 2 of them"):
        fit_batches(model, tokenizer, [kinds])
    with pytest.raises(DataError, match="no whole numbers"):
        fit_batches(model, tokenizer, [{"input_ids": ids.float()}])


def test_numbers_are_as_many_as_the_model_has_outputs() -> None:
    model, tokenizer = tiny.bert(num_labels=3, problem_type="regression"), tiny.tokenizer()
    batch = {"input_ids": torch.tensor([[3], [4]]), "labels": torch.ones(2, 3)}
    assert fit_batches(model, tokenizer, [batch])[0]["labels"].shape == (2, 3)
    with pytest.raises(DataError, match="a row has 1 numbers as its label, the model has 3"):
        fit_batches(model, tokenizer, [{**batch, "labels": torch.ones(2)}])


def test_model_without_a_mask_takes_no_padding() -> None:
    model, tokenizer = made("FNetForSequenceClassification", **_ENCODER), tiny.tokenizer()
    even, padded = (tokenizer(x, padding=True, return_tensors="pt") for x in ("a", ["a", "a cat"]))
    fit_batches(model, tokenizer, [even])
    with pytest.raises(DataError, match=r"takes no attention_mask.*batch_size=1"):
        fit_batches(model, tokenizer, [even, padded])


@pytest.mark.parametrize("broken", [None, "{}", "{nonsense"])
def test_folder_without_a_tokenizer_is_refused(tmp_path: Path, broken: str | None) -> None:
    """Also where transformers makes one of special tokens, to which every word is unknown."""
    tiny.bert().save_pretrained(tmp_path)
    if broken is not None:
        (tmp_path / "tokenizer.json").write_text(broken)
    with pytest.raises(ModelError, match=r"tokenizer\.save_pretrained"):
        load_tokenizer(str(tmp_path))
