"""Configuration of the hybrid embedder: a frozen LLM whose states feed an encoder."""

from transformers import AutoConfig, PreTrainedConfig

# Encoders whose position table starts after the padding row: real tokens count from pad_token_id + 1.
# Every other encoder counts from 0.
_POSITIONS_START_AFTER_PAD = frozenset(
    {"camembert", "data2vec-text", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
)

_AUTO_MAP = {
    "AutoConfig": "configuration_hybrid.HybridConfig",
    "AutoModel": "modeling_hybrid.HybridModel",
    "AutoModelForSequenceClassification": "modeling_hybrid.HybridForSequenceClassification",
}


def _as_config(config):
    """`config` as a `PreTrainedConfig`; saved files hold sub-configurations as dictionaries."""
    if isinstance(config, dict):
        return AutoConfig.for_model(**config)
    return config


def _keep_blocks(llm_config, depth: int, kept: int):
    """A copy of `llm_config` with the first `kept` of `depth` blocks, its per-layer lists (`layer_types`, ...) cut alike."""
    values = llm_config.to_dict()
    for name, value in values.items():
        if isinstance(value, list) and len(value) == depth and ("layer" in name or "block" in name):
            values[name] = value[:kept]
    values["num_hidden_layers"] = kept
    return type(llm_config).from_dict(values)


class HybridConfig(PreTrainedConfig):
    """Describes a [`HybridModel`].

    Args:
        llm_config (`PreTrainedConfig` or `dict`):
            A decoder-only LLM (Gemma, Llama, Qwen3, ...). Its blocks above the deepest of `llm_layers` are dropped.
        encoder_config (`PreTrainedConfig` or `dict`, *optional*):
            An encoder that accepts `inputs_embeds` (RoBERTa, XLM-R, BERT, ModernBERT, ...). `None` is the LLM-only
            baseline: the merged LLM states themselves are the output.
        llm_layers (`list[int]`):
            The layers whose states are read, counted as `hidden_states` counts them: 1 is the output of the first
            block, `llm_depth` the output of the last one after the final norm.
        layer_pooling (`str`, defaults to `"mean"`):
            How the standardised states of several layers are merged: dimension by dimension by `"mean"` or `"max"`, or
            side by side (`"concat"`), which gives the projector a matrix for each layer.
        llm_depth (`int`, *optional*):
            The number of blocks of the whole LLM; by default that of `llm_config` as it is given here.
        projector_dropout (`float`, defaults to 0.0):
            Dropout of the merged LLM states in front of the projector, in training.
        layer_dropout (`float`, defaults to 0.0):
            With `"concat"`, the probability that a text is trained without a layer, except for one, drawn at random, that
            stays. The projections of the layers that are left stand in for all.
        read_words (`bool`, defaults to `False`):
            Whether the encoder reads each text twice, from the projected LLM states and from its own word embeddings of the
            LLM's tokens. The model's output is the mean of both.

    Raises:
        ValueError: if `llm_layers` is empty, repeats a layer or names one that the LLM does not have, or if
            `layer_pooling` or a dropout is not a possible value.
    """

    model_type = "hybrid_embedder"
    sub_configs = {"llm_config": AutoConfig, "encoder_config": AutoConfig}

    def __init__(
        self,
        llm_config=None,
        encoder_config=None,
        llm_layers=None,
        layer_pooling="mean",
        llm_depth=None,
        projector_dropout=0.0,
        layer_dropout=0.0,
        read_words=False,
        **kwargs,
    ):
        if llm_config is None:
            # transformers builds a default instance of every config class to see what differs from it.
            llm_config, llm_layers = AutoConfig.for_model("gemma", num_hidden_layers=1), [1]
        llm_config, encoder_config = _as_config(llm_config), _as_config(encoder_config)
        # A multimodal checkpoint (Gemma 3 4B and larger) keeps its language model's settings one level down.
        llm_config = llm_config.get_text_config(decoder=True)
        depth = llm_depth or llm_config.num_hidden_layers
        layers = [llm_layers] if isinstance(llm_layers, int) else sorted(llm_layers or [])
        if not layers:
            raise ValueError("llm_layers is empty: name at least one layer of the LLM, e.g. llm_layers=[7].")
        if len(set(layers)) < len(layers):
            raise ValueError(f"llm_layers={layers} names a layer twice.")
        unknown = [layer for layer in layers if not 1 <= layer <= depth]
        if unknown:
            raise ValueError(f"llm_layers={layers}: {unknown} not in this LLM, whose layers are 1 to {depth}.")
        if layers[-1] > llm_config.num_hidden_layers:
            raise ValueError(
                f"llm_layers={layers}: of this LLM only the first {llm_config.num_hidden_layers} blocks are kept."
            )
        if layer_pooling not in ("mean", "max", "concat"):
            raise ValueError(f"layer_pooling must be 'mean', 'max' or 'concat', not {layer_pooling!r}.")
        if layer_pooling == "concat" and encoder_config is None:
            raise ValueError("layer_pooling='concat' needs an encoder: the LLM alone merges by 'mean' or 'max'.")
        for name, value in (("projector_dropout", projector_dropout), ("layer_dropout", layer_dropout)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, not {value}.")
        if layer_dropout and layer_pooling != "concat":
            raise ValueError("layer_dropout leaves layers out of layer_pooling='concat', and of no other.")
        if read_words and encoder_config is None:
            raise ValueError("read_words needs an encoder, whose word embeddings are read.")

        self.llm_config = _keep_blocks(llm_config, llm_config.num_hidden_layers, layers[-1])
        self.encoder_config = encoder_config
        self.llm_layers = layers
        self.layer_pooling = layer_pooling
        self.llm_depth = depth
        self.projector_dropout = projector_dropout
        self.layer_dropout = layer_dropout
        self.read_words = read_words

        # sentence-transformers reads these three at top level.
        self.hidden_size = (encoder_config or llm_config).hidden_size
        self.vocab_size = llm_config.vocab_size
        self.max_position_embeddings = llm_config.max_position_embeddings
        if encoder_config is not None:
            self.max_position_embeddings = min(
                self.max_position_embeddings, encoder_config.max_position_embeddings - self.encoder_position_offset
            )
        # One repository serves the embedding model and the classifier.
        kwargs.setdefault("auto_map", dict(_AUTO_MAP))
        kwargs = {k: v for k, v in kwargs.items() if k not in ("hidden_size", "vocab_size", "max_position_embeddings")}
        super().__init__(**kwargs)

    @property
    def layers_side_by_side(self) -> int:
        """How many layers' states the projector reads beside each other: all with `"concat"`, else one, that of the merged."""
        return len(self.llm_layers) if self.layer_pooling == "concat" else 1

    @property
    def encoder_position_offset(self) -> int:
        """The encoder's position id of a text's first token: `pad_token_id + 1` in the RoBERTa family, else 0."""
        if self.encoder_config.model_type in _POSITIONS_START_AFTER_PAD:
            return self.encoder_config.pad_token_id + 1
        return 0

    @property
    def reads_final_norm(self) -> bool:
        """Whether the deepest layer read is the LLM's last, whose `hidden_states` entry is after the final norm."""
        return self.llm_layers[-1] == self.llm_depth


__all__ = ["HybridConfig"]
