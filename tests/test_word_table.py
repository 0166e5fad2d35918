"""Which word pieces of the encoder the LLM's tokens are, with the tokenizers of tests and with WordPiece."""

import torch
from conftest import TEXTS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_hybrid import HybridModel, WordReader
from word_table import set_word_table, token_texts, word_table

PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "un",
    "##happ",
    "##y",
    "happy",
    "i",
    "##s",
    "'",
    "s",
    "is",
    "2",
    "##2",
    ".",
]


def word_piece_tokenizer():
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def sentencepiece_like_tokenizer():
    """Spaces are part of the token behind them, as Gemma has it."""
    vocabulary = {
        t: i for i, t in enumerate(["<pad>", "<bos>", "▁un", "happy", "▁happy", "I", "s", "▁is", "'", "2", "."])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<pad>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>")


def test_word_pieces_at_the_start_of_a_word_and_inside_one():
    llm, encoder = sentencepiece_like_tokenizer(), word_piece_tokenizer()
    llm_ids = llm.get_vocab()
    assert token_texts(llm)[llm_ids["▁un"]] == " un"
    for rows in (len(llm) - 1, len(llm) + 5):  # fewer than the tokenizer's tokens, and more
        words = WordReader(rows, len(PIECES), 4)
        words.set_table(*word_table(llm, encoder))

    def read(*tokens):
        input_ids = torch.tensor([[llm_ids[token] for token in tokens]])
        pieces = words.look_up(input_ids, torch.ones_like(input_ids))
        return [[PIECES[i] for i in row if i >= 0] for row in pieces[0].tolist()]

    assert read("<bos>", "I", "s", "▁un", "happy", ".") == [["[CLS]"], ["i"], ["##s"], ["un"], ["happy"], ["."]]
    assert read("▁happy", "'", "s", "▁is", "2", "2") == [["happy"], ["'"], ["s"], ["is"], ["##2"], ["##2"]]
    assert read("2", "2", "<pad>", "2") == [["2"], ["##2"], [], ["2"]]


def test_the_table_of_a_model(tiny_llm, tiny_encoder, llm_tokenizer):
    """With byte-level tokenizers on both sides every token is the pieces of its own text."""
    model = HybridModel.from_backbones(tiny_llm, tiny_encoder, llm_layers=[2], read_words=True)
    set_word_table(model, llm_tokenizer, tiny_encoder)
    encoder_tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    texts = token_texts(llm_tokenizer)
    for text in TEXTS[:5]:
        for token in llm_tokenizer(text, add_special_tokens=False)["input_ids"]:
            expected = encoder_tokenizer(texts[token], add_special_tokens=False)["input_ids"][: WordReader.MAX_PIECES]
            if texts[token]:
                assert [i for i in model.words.pieces[0, token].tolist() if i >= 0] == expected
    assert model.words.pieces[0, llm_tokenizer.bos_token_id, 0] == encoder_tokenizer.cls_token_id
    embeddings = torch.nn.Embedding.from_pretrained(model.words.word_embeddings.weight.detach())
    assert embeddings.num_embeddings == model.config.encoder_config.vocab_size
