"""The hybrid embedder: a frozen LLM reads the text, an encoder reads the LLM's states, their mean is the embedding.

    input_ids -> llm blocks 1..k -> hidden states of llm_layers -> standardise each dimension, merge the layers
              -> projector -> encoder (as inputs_embeds) -> mean over the text's tokens

With `config.read_words` the encoder reads the text a second time, from its own word embeddings of the same tokens, and the
states of both readings are averaged.

A published repository carries this file and `configuration_hybrid.py`, so both import torch and transformers alone.
"""

import inspect
import re
from contextvars import ContextVar
from functools import partial

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.utils import logging

try:
    from .configuration_hybrid import HybridConfig
except ImportError:  # run from a checkout, where the files lie beside each other
    from configuration_hybrid import HybridConfig

# The states of the blocks below the deepest one, by layer, while one forward of the LLM runs. A context variable
# keeps threads that encode through one model apart, and a hook that is a plain function lets the model be pickled,
# which output_hidden_states does not.
_CAPTURED: ContextVar[dict | None] = ContextVar("captured_hidden_states", default=None)


def _capture(layer, block, args, output):
    if (captured := _CAPTURED.get()) is not None:
        captured[layer] = output[0] if isinstance(output, tuple) else output


def _refuse_float16(dtype):
    if dtype == torch.float16:
        raise ValueError(
            "The hybrid does not run in float16: Gemma's activations come near 8e5, beyond its range (65504), and turn "
            "into NaN. Use torch.bfloat16 or torch.float32."
        )


def _refuse_not_finite(values: torch.Tensor, what: str):
    # A graph that is compiled or exported cannot branch on its values.
    if not torch.compiler.is_compiling() and not torch.isfinite(values).all():
        raise ValueError(
            f"The {what} contain NaN or infinity: the weights are damaged, or overflow in this precision. Download or "
            "train them again, and use torch.float32."
        )


def masked_mean(states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean of `states` (batch, tokens, dim) over the tokens that `attention_mask` (batch, tokens) keeps: (batch, dim).

    A text without any token has the zero vector.
    """
    mask = attention_mask.unsqueeze(-1).to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1)


class HiddenStateStandardizer(nn.Module):
    """Standardises each dimension of each layer's states: (states - mean) / deviation, clipped.

    A few dimensions of an LLM's states hold most of a token's energy ("massive activations", Sun et al. 2024,
    arXiv:2402.17762), and per-token normalisation leaves that as it is. The statistics are those of the training texts'
    tokens without BOS. Until [`set_statistics`] is called, the module is the identity.
    """

    def __init__(self, num_layers: int, hidden_size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_layers, hidden_size))
        self.register_buffer("deviation", torch.ones(num_layers, hidden_size))
        self.register_buffer("clip", torch.tensor(float("inf")))

    def set_statistics(self, mean: torch.Tensor, deviation: torch.Tensor, clip: float = 5.0):
        """Sets mean and deviation (both: layers, hidden size) and the bound of the result, in deviations."""
        if not (torch.isfinite(mean).all() and torch.isfinite(deviation).all()):
            raise ValueError("The statistics of the LLM states are not finite: check the LLM's weights for NaN.")
        self.mean.copy_(mean)
        # A dimension that never varies says nothing; the floor keeps it from becoming NaN.
        self.deviation.copy_(deviation.clamp(min=1e-6))
        self.clip.fill_(clip)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` (batch, layers, tokens, hidden size) of any precision; the result is float32."""
        standardized = (hidden_states.float() - self.mean[:, None]) / self.deviation[:, None]
        return torch.clamp(standardized, -self.clip, self.clip)


class WordReader(nn.Module):
    """The encoder's word embeddings of the LLM's tokens: of a token that is several words pieces to the encoder, their mean.

    One tokenizer serves both readings, and they agree in the number of tokens and in their places. A token that goes on
    with a word ("##ing") is another word piece than the same letters at the start of one, so each has two rows: which of
    them holds is seen from the token before. Until [`set_table`] is called, no token has a word piece.
    """

    MAX_PIECES = 4

    def __init__(self, llm_vocab_size: int, vocab_size: int, hidden_size: int):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size)
        self.register_buffer("pieces", torch.full((2, llm_vocab_size, self.MAX_PIECES), -1, dtype=torch.int32))
        self.register_buffer("starts_inside", torch.zeros(llm_vocab_size, dtype=torch.bool))
        self.register_buffer("ends_inside", torch.zeros(llm_vocab_size, dtype=torch.bool))

    def set_table(self, pieces: torch.Tensor, starts_inside: torch.Tensor, ends_inside: torch.Tensor):
        """
        Args:
            pieces (2, LLM tokens, up to `MAX_PIECES`): the ids of each token's word pieces, filled up with -1: at the start of
                a word, and inside one.
            starts_inside, ends_inside (LLM tokens): whether the token begins, or ends, with a letter or digit, so that it
                may belong to the same word as its neighbour.
        """
        # A tokenizer may know more tokens than the LLM (images, say) or fewer: rows are often filled up to a round number.
        rows, width = min(pieces.shape[1], self.pieces.shape[1]), pieces.shape[2]
        self.pieces.fill_(-1)[:, :rows, :width] = pieces[:, :rows]
        self.starts_inside.zero_()[:rows] = starts_inside[:rows]
        self.ends_inside.zero_()[:rows] = ends_inside[:rows]

    def look_up(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The word pieces (batch, tokens, `MAX_PIECES`) of texts (batch, tokens), filled up with -1."""
        ends_inside = self.ends_inside[input_ids] & attention_mask.bool()
        inside = self.starts_inside[input_ids] & nn.functional.pad(ends_inside[:, :-1], (1, 0))
        return self.pieces[inside.long(), input_ids]

    def forward(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(batch, tokens) to (batch, tokens, hidden size); a token without word pieces has the zero vector."""
        pieces = self.look_up(input_ids, attention_mask)
        weights = (pieces >= 0).to(self.word_embeddings.weight.dtype).unsqueeze(-1)
        embedded = self.word_embeddings(pieces.clamp(min=0).long())
        return (embedded * weights).sum(2) / weights.sum(2).clamp(min=1)


class WideningEmbedding(nn.Module):
    """A token embedding whose table stays in bfloat16 while the network that reads it runs in float32.

    The table is most of a small LLM's weights, and is only looked up: a buffer, not a parameter, so that the precision of
    the LLM's parameters is the one in which it computes. Gemma 3's embedding scales what it returns.
    """

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.register_buffer("weight", embedding.weight.detach())
        self.scale = getattr(embedding, "scalar_embed_scale", 1.0)

    def forward(self, input_ids: torch.LongTensor) -> torch.Tensor:
        return nn.functional.embedding(input_ids, self.weight).float() * self.scale


def has_fast_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware: its GPU, else its CPU.

    A CPU without the units is over a hundred times slower in bfloat16 than in float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class HybridPreTrainedModel(PreTrainedModel):
    config_class = HybridConfig
    base_model_prefix = "hybrid"
    input_modalities = ("text",)
    _supports_sdpa = True
    _supports_flash_attn = True
    # The trained parts stay in float32 when the LLM is loaded in bfloat16.
    _keep_in_fp32_modules_strict = {
        r"^(?:hybrid\.)?(?:standardizer|projector|words\.word_embeddings|encoder|classifier)\."
    }

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, HiddenStateStandardizer):
            init.zeros_(module.mean)
            init.ones_(module.deviation)
            init.constant_(module.clip, float("inf"))
        elif isinstance(module, WordReader):
            init.constant_(module.pieces, -1)
            init.zeros_(module.starts_inside)
            init.zeros_(module.ends_inside)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, dtype=None, **kwargs):
        """As in transformers, where `dtype` is the precision of the LLM; the trained parts are float32.

        By default it is the one on disk, except that a CPU without bfloat16 units gets a float32 LLM, its token
        embeddings left as they are.

        Raises:
            ValueError: the file lacks a weight or has one of another shape, which would start at random.
            OSError: the file is damaged.
        """
        dtype = kwargs.pop("torch_dtype", "auto") if dtype is None else dtype
        wants_info = kwargs.pop("output_loading_info", False)
        may_resize = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        except Exception as error:
            if type(error).__name__ != "SafetensorError":  # safetensors itself is not imported here
                raise
            raise OSError(
                f"The weights of {pretrained_model_name_or_path} are damaged ({error}): download or train them again."
            ) from error
        mismatched = set() if may_resize else {key for key, *_ in info["mismatched_keys"]}
        _refuse_random_weights(pretrained_model_name_or_path, model, {*info["missing_keys"], *mismatched})
        if dtype == "auto" and model.base_model.llm.dtype == torch.bfloat16 and not has_fast_bfloat16():
            model.base_model.widen_llm()
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory, *args, state_dict=None, **kwargs):
        """As in transformers, but an LLM that was released in bfloat16 is stored in it, whatever it runs in."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        llm = {name: tensor for name, tensor in state_dict.items() if _LLM_NAME.search(name)}
        rounded = {name: tensor.to(torch.bfloat16) for name, tensor in llm.items()}
        lossless = all(torch.equal(rounded[name].to(tensor.dtype), tensor) for name, tensor in llm.items())
        super().save_pretrained(
            save_directory, *args, state_dict={**state_dict, **rounded} if lossless else state_dict, **kwargs
        )
        # transformers takes the precision in memory for that of the files, and reads it when it loads them.
        self.config.dtype = "bfloat16" if lossless else "float32"
        self.config.save_pretrained(save_directory)


_LLM_NAME = re.compile(r"^(?:hybrid\.)?llm\.")


class HybridModel(HybridPreTrainedModel):
    """The embedding model. Without `config.encoder_config` it is the LLM-only baseline."""

    # The same weights file serves the classifier, whose head the embedding model leaves out.
    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]

    def __init__(
        self, config: HybridConfig, llm: PreTrainedModel | None = None, encoder: PreTrainedModel | None = None
    ):
        super().__init__(config)
        _refuse_float16(config.dtype)

        self.llm = llm or AutoModel.from_config(config.llm_config)
        if not config.reads_final_norm:
            self.llm.norm = nn.Identity()  # hidden_states[k] is before the norm for all but the last layer
        for layer in config.llm_layers[:-1]:
            self.llm.layers[layer - 1].register_forward_hook(partial(_capture, layer))

        llm_hidden_size = config.llm_config.hidden_size
        self.standardizer = HiddenStateStandardizer(len(config.llm_layers), llm_hidden_size)
        if config.encoder_config is None:
            self.projector = self.words = self.encoder = None
        else:
            self.projector = nn.Sequential(
                nn.Dropout(config.projector_dropout),
                nn.Linear(llm_hidden_size * config.layers_side_by_side, config.encoder_config.hidden_size),
            )
            self.encoder = encoder or AutoModel.from_config(config.encoder_config)
            if "inputs_embeds" not in inspect.signature(self.encoder.forward).parameters:
                raise ValueError(
                    f"{type(self.encoder).__name__} takes no `inputs_embeds`, which is where the projected LLM states "
                    "enter. Choose an encoder that does, e.g. RoBERTa, XLM-R, BERT or ModernBERT."
                )
            self.words = None
            if config.read_words:
                self.words = WordReader(
                    config.vocab_size, config.encoder_config.vocab_size, config.encoder_config.hidden_size
                )
                if encoder is not None:
                    self.words.word_embeddings.weight = encoder.get_input_embeddings().weight
            # The projector stands in for the word embeddings, and nobody reads the pooler.
            self.encoder.set_input_embeddings(nn.Identity())
            if getattr(self.encoder, "pooler", None) is not None:
                self.encoder.pooler = None
        self.post_init()
        self.train(self.training)

    def get_input_embeddings(self):
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.llm.set_input_embeddings(value)

    def train(self, mode: bool = True):
        """As in torch, but the LLM stays frozen and in evaluation mode.

        `from_pretrained` undoes a freeze made in `__init__`, and ends with a call of this method.
        """
        super().train(mode)
        self.llm.train(False).requires_grad_(False)
        return self

    @classmethod
    def from_backbones(
        cls,
        llm: str,
        encoder: str | None,
        llm_layers: list[int],
        layer_pooling: str = "mean",
        projector_dropout: float = 0.0,
        layer_dropout: float = 0.0,
        read_words: bool = False,
        llm_dtype: torch.dtype = torch.float32,
        llm_revision: str = "main",
        encoder_revision: str = "main",
    ) -> "HybridModel":
        """Joins a pretrained LLM and a pretrained encoder; the projector between them is new.

        Args:
            llm, encoder: Hub ids, local directories, or names of the offline backbones (see `backbones.py`, which
                only a checkout of the kit has). `encoder=None` makes the LLM-only baseline.
            llm_layers, layer_pooling, projector_dropout, layer_dropout, read_words: see [`HybridConfig`]. Which words
                the LLM's tokens are to the encoder is set afterwards, by `word_table.set_word_table`.
            llm_dtype: precision of the frozen LLM; projector and encoder are float32.
            llm_revision, encoder_revision: branch, tag or commit on the Hub.

        Raises:
            OSError: a backbone is not found, or is gated and not yet accepted.
            ValueError: see [`HybridConfig`]; or the encoder takes no `inputs_embeds`; or `llm_dtype` is float16.
        """
        _refuse_float16(llm_dtype)
        try:
            from backbones import resolve_backbone
        except ImportError:  # a published model's code travels without the kit
            resolve_backbone = str

        llm = resolve_backbone(llm)
        encoder = encoder and resolve_backbone(encoder)
        config = HybridConfig(
            llm_config=AutoConfig.from_pretrained(llm, revision=llm_revision),
            encoder_config=encoder and AutoConfig.from_pretrained(encoder, revision=encoder_revision),
            llm_layers=llm_layers,
            layer_pooling=layer_pooling,
            projector_dropout=projector_dropout,
            layer_dropout=layer_dropout,
            read_words=read_words,
        )
        # With the shortened configuration only the kept blocks are read from disk.
        llm_model = _load_backbone(llm, llm_revision, llm_dtype, config.llm_config)
        encoder_model = encoder and _load_backbone(encoder, encoder_revision, torch.float32, config.encoder_config)
        return cls(config, llm=llm_model, encoder=encoder_model).eval()

    def widen_llm(self):
        """Turns a bfloat16 LLM into float32 in place, except for its token embeddings, which are only looked up."""
        self.llm.layers.float()
        self.llm.norm.float()
        self.llm.set_input_embeddings(WideningEmbedding(self.llm.get_input_embeddings()))

    def hidden_states(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The LLM's states at `config.llm_layers`: (batch, layers, tokens, LLM hidden size), zero at padding.

        Runs without autograd, in the LLM's precision. Row i equals `output_hidden_states[llm_layers[i]]` of the whole
        LLM. `input_ids` and `attention_mask`: (batch, tokens).
        """
        _refuse_float16(self.llm.dtype)
        if input_ids.shape[1] == 0:  # empty texts, from a tokenizer that puts no BOS in front
            shape = (len(input_ids), len(self.config.llm_layers), 0, self.config.llm_config.hidden_size)
            return torch.zeros(shape, dtype=self.llm.dtype, device=input_ids.device)
        captured = {}
        token = _CAPTURED.set(captured)
        try:
            with torch.no_grad():
                output = self.llm(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=(attention_mask.long().cumsum(1) - 1).clamp(min=0),
                    use_cache=False,
                )
        finally:
            _CAPTURED.reset(token)
        captured[self.config.llm_layers[-1]] = output.last_hidden_state
        states = torch.stack([captured[layer] for layer in self.config.llm_layers], dim=1)
        return states.masked_fill(attention_mask[:, None, :, None] == 0, 0.0)

    def merge_layers(self, llm_hidden_states: torch.Tensor) -> torch.Tensor:
        """Standardises the states of each layer and merges them: (batch, layers, tokens, dim) to (batch, tokens, dim).

        Layers side by side have dim times their number, and each is divided by their number: the projector's output is then
        the mean of what it makes of each, and its weights have the size, and learn at the pace, of those of a single layer.
        """
        standardized = self.standardizer(llm_hidden_states)
        if self.config.layer_pooling == "max":
            return standardized.amax(dim=1)
        if self.config.layer_pooling == "concat":
            return (standardized * self._layer_weights(standardized)).transpose(1, 2).flatten(2)
        return standardized.mean(dim=1)

    def _layer_weights(self, states: torch.Tensor) -> torch.Tensor:
        """The weight of each layer of each text, (batch, layers, 1, 1): they add up to 1, and layer dropout makes some zero."""
        batch_size, num_layers = states.shape[:2]
        kept = torch.ones(batch_size, num_layers, dtype=states.dtype, device=states.device)
        if self.training and self.config.layer_dropout:
            kept = (torch.rand_like(kept) >= self.config.layer_dropout).to(states.dtype)
            spared = torch.randint(num_layers, (batch_size, 1), device=states.device)
            kept = kept.scatter(1, spared, 1.0)
        return (kept / kept.sum(1, keepdim=True))[:, :, None, None]

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        llm_hidden_states: torch.Tensor | None = None,
        separate_readings: bool = False,
        return_dict: bool = True,
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            input_ids (batch, tokens): from the LLM's tokenizer, padded on either side.
            attention_mask (batch, tokens): 1 for tokens, 0 for padding; all ones by default.
            llm_hidden_states (batch, layers, tokens, LLM hidden size): what [`hidden_states`] returned for the same
                texts, in place of `input_ids` (with `config.read_words`, beside them): training computes them once.
            separate_readings: with `config.read_words`, return both readings, as they are trained, and not their mean.

        Returns:
            `last_hidden_state` (batch, tokens, hidden size) and `pooler_output` (batch, hidden size), its mean over
            the tokens of each text. A text without any token has the zero vector. Separate readings are rows: of the
            states those of all texts, then of the words.

        Raises:
            ValueError: not exactly one of `input_ids` and `llm_hidden_states` is given, or (with `config.read_words`) no
                `input_ids`, or it has another shape; the texts have more tokens than `config.max_position_embeddings`; or,
                outside training, an embedding is not finite.
        """
        if self.words is not None:
            if input_ids is None:
                raise ValueError(
                    "This model reads words and states: give `input_ids`, also beside `llm_hidden_states`."
                )
        elif (input_ids is None) == (llm_hidden_states is None):
            raise ValueError("Give either `input_ids` or `llm_hidden_states`.")
        elif separate_readings:
            raise ValueError("This model has one reading of a text: config.read_words=False.")
        given = llm_hidden_states if input_ids is None else input_ids
        if given.dim() != (4 if input_ids is None else 2):
            raise ValueError(
                f"The input's shape is {tuple(given.shape)}, not (batch, tokens) or, of states, (batch, layers, tokens, "
                "hidden size): give a list of at least one text."
            )
        batch_size, num_tokens = given.shape[0], given.shape[2 if input_ids is None else 1]
        if num_tokens > self.config.max_position_embeddings:
            raise ValueError(
                f"A text of {num_tokens} tokens is longer than the model's {self.config.max_position_embeddings}: "
                "tokenize with `truncation=True`."
            )
        if attention_mask is None:
            attention_mask = torch.ones(batch_size, num_tokens, dtype=torch.long, device=given.device)

        if llm_hidden_states is None:
            llm_hidden_states = self.hidden_states(input_ids, attention_mask)
        states = self.merge_layers(llm_hidden_states)
        readings = 1 if self.words is None else 2
        if num_tokens == 0:
            states = states.new_zeros(readings * batch_size, 0, self.config.hidden_size)
        elif self.encoder is not None:
            inputs_embeds = [self.projector(states.to(self.projector[-1].weight.dtype))]
            if self.words is not None:
                inputs_embeds.append(self.words(input_ids, attention_mask))
            # Positions count a text's own tokens, so that padding on the left does not move them.
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0) + self.config.encoder_position_offset
            states = self.encoder(
                inputs_embeds=torch.cat(inputs_embeds),
                attention_mask=attention_mask.repeat(readings, 1),
                position_ids=position_ids.repeat(readings, 1),
            ).last_hidden_state
        if separate_readings:
            attention_mask = attention_mask.repeat(readings, 1)
        elif readings > 1:
            states = states.unflatten(0, (readings, batch_size)).mean(0)
        pooled = masked_mean(states, attention_mask)
        if not self.training:  # which looks at its loss
            _refuse_not_finite(pooled, "embeddings")
        output = BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)
        return output if return_dict else output.to_tuple()


class HybridForSequenceClassification(HybridPreTrainedModel):
    """The embedding model with a linear classification head on the pooled embedding."""

    def __init__(self, config: HybridConfig, hybrid: HybridModel | None = None):
        super().__init__(config)
        self.hybrid = hybrid or HybridModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self):
        return self.hybrid.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.hybrid.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        llm_hidden_states: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput:
        """As [`HybridModel.forward`]; `logits` (batch, labels), and with `labels` (batch) the cross-entropy as `loss`."""
        pooled = self.hybrid(input_ids, attention_mask, llm_hidden_states).pooler_output
        logits = self.classifier(pooled.to(self.classifier.weight.dtype))
        if not self.training:
            _refuse_not_finite(logits, "logits")
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output if return_dict else output.to_tuple()


def _load_backbone(name: str, revision: str, dtype: torch.dtype, config) -> PreTrainedModel:
    """`AutoModel.from_pretrained`, with an error where it would start weights at random."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the report would list every block that is left out on purpose
    try:
        model, info = AutoModel.from_pretrained(
            name,
            revision=revision,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    finally:
        logging.set_verbosity(verbosity)
    wrong = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    _refuse_random_weights(name, model, {key for key in wrong if not key.startswith("pooler.")})
    return model


def _refuse_random_weights(name, model, keys: set[str]):
    if keys:
        raise ValueError(
            f"{name} lacks weights of {type(model).__name__}, or has them in another shape, and they would start at "
            f"random: {sorted(keys)[:5]}. The file is not the one that belongs to this configuration."
        )


HybridConfig.register_for_auto_class()
HybridModel.register_for_auto_class("AutoModel")
HybridForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["HybridModel", "HybridForSequenceClassification"]
