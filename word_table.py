"""Which of the encoder's word pieces each token of the LLM is, so that the encoder can read its own words.

The two tokenizers cut a text differently. The encoder's is run on the text of each LLM token alone, once as the start of a
word and once inside one (WordPiece writes "##ing"), which for most texts gives its own pieces of the whole text.
"""

import json

import torch
from transformers import AutoTokenizer

from backbones import check_tokenizer
from modeling_hybrid import WordReader


def set_word_table(model, tokenizer, encoder: str, encoder_revision: str = "main"):
    """Sets the table of `model.words` from the tokenizers of the LLM and of `encoder`."""
    encoder_tokenizer = check_tokenizer(AutoTokenizer.from_pretrained(encoder, revision=encoder_revision), encoder)
    model.words.set_table(*word_table(tokenizer, encoder_tokenizer))


def word_table(tokenizer, encoder_tokenizer):
    """`(pieces, starts_inside, ends_inside)`, as [`WordReader.set_table`] takes them.

    The LLM's BOS stands for the token that the encoder puts in front of a text, and other special tokens for none. A token
    has its first `WordReader.MAX_PIECES` pieces, which is all but for long words and rulers ("==========").
    """
    texts = token_texts(tokenizer)
    at_start = encoder_tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    prefix = json.loads(encoder_tokenizer.backend_tokenizer.to_str())["model"].get("continuing_subword_prefix") or ""
    vocabulary = encoder_tokenizer.get_vocab()
    names = {id: name for name, id in vocabulary.items()}
    width = WordReader.MAX_PIECES
    rows = [[*ids[:width], *[-1] * (width - len(ids))] for ids in at_start]
    pieces = torch.tensor([rows, rows], dtype=torch.int32)
    pieces[1, :, 0] = torch.tensor(
        [vocabulary.get(prefix + names[row[0]], row[0]) if row[0] >= 0 else -1 for row in rows]
    )
    in_front = (encoder_tokenizer.cls_token_id, encoder_tokenizer.bos_token_id)
    first = next((token for token in in_front if token is not None), None)
    if tokenizer.bos_token_id is not None and first is not None:
        pieces[:, tokenizer.bos_token_id, 0] = first
    starts_inside = torch.tensor([text[:1].isalnum() for text in texts])
    ends_inside = torch.tensor([text[-1:].isalnum() for text in texts])
    return pieces, starts_inside, ends_inside


def token_texts(tokenizer) -> list[str]:
    """The text of each token, with the space that it begins with; of special tokens and parts of a character, nothing."""
    # Behind another token, since some decoders drop the space in front of a text.
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = len(tokenizer.decode(anchor))
    decoded = tokenizer.batch_decode([[*anchor, token] for token in range(len(tokenizer))])
    special = set(tokenizer.all_special_ids)
    return ["" if token in special or "\ufffd" in text else text[start:] for token, text in enumerate(decoded)]
