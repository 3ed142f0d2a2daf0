"""transformers: any architecture that its configuration mapping knows, shrunk to a few narrow layers, random weights.

Sizes are shrunk by name: of those in ``_SMALL`` a configuration gets the ones that it has, sub-configurations too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.sample import Sample

LIBRARY = "transformers"
VOCABULARY, LENGTH = 100, 8

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "d_model": 32, "dim": 32, "n_embd": 32, "embedding_size": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_head": 8,
    "d_kv": 8, "intermediate_size": 48, "d_ff": 48, "hidden_dim": 48, "d_inner": 48, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "ffn_dim": 48, "n_inner": 48, "max_position_embeddings": 64, "n_positions": 64,
    "max_source_positions": 64, "max_target_positions": 64, "image_size": 32, "patch_size": 8, "projection_dim": 16,
    "num_labels": 4, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "state_size": 4, "time_step_rank": 4, "num_mel_bins": 16,
    "word_embed_proj_dim": 32, "rotary_dim": 4, "embedding_dim": 32, "decoder_hidden_size": 32, "type_vocab_size": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
    "forced_bos_token_id": None, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
    "n_routed_experts": 4, "n_shared_experts": 1,
}  # fmt: skip
# What shrinking by name does not get right.
_OPTIONS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4, "intermediate_size": 48},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1, "block_repeats": [1, 1]},
    "wav2vec2": {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 3), "num_feat_extract_layers": 2,
                 "mask_time_prob": 0.0, "layerdrop": 0.0},
    "hubert": {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 3), "num_feat_extract_layers": 2,
               "mask_time_prob": 0.0, "layerdrop": 0.0},
    "mamba": {"intermediate_size": 64}, "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    "xlnet": {"d_head": 8, "mem_len": None}, "longformer": {"attention_window": [4, 4]},
    "big_bird": {"attention_type": "original_full"}, "reformer": {},
    "deepseek_v2": {"head_dim": 4, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    "deepseek_v3": {"head_dim": 4, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    "swin": {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 16, "window_size": 2, "patch_size": 4},
    "falcon": {"new_decoder_architecture": False}, "rwkv": {"attention_hidden_size": 32},
    "convnext": {"hidden_sizes": [16, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
    "resnet": {"hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 16, "layer_type": "basic"},
    "segformer": {}, "gemma3_text": {"layer_types": None}, "cohere2": {"layer_types": None},
    "qwen2": {"layer_types": None}, "qwen3": {"layer_types": None}, "gemma2": {"layer_types": None},
    "led": {"attention_window": [4, 4], "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "gpt_oss": {"layer_types": None}, "gpt_neox": {"rotary_pct": 1.0},
}  # fmt: skip
_PATHS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("text", ("bert", "roberta", "distilbert", "albert", "electra", "deberta", "deberta-v2", "camembert",
              "convbert", "fnet", "longformer", "big_bird", "xlnet",
              "funnel", "esm", "modernbert")),
    ("causal", ("gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "bloom", "llama", "mistral", "mixtral",
                "gemma", "gemma2", "qwen2", "qwen3", "qwen2_moe", "phi", "phi3", "falcon", "olmo",
                "cohere", "mamba", "gpt_oss", "deepseek_v3")),
    ("seq2seq", ("t5", "bart", "mbart", "marian", "pegasus", "m2m_100", "led")),
    ("image", ("vit", "deit", "beit", "dinov2", "swin", "convnext", "resnet", "segformer")),
    ("audio", ("wav2vec2", "audio-spectrogram-transformer")),
    ("own", ("clip", "whisper")),
)  # fmt: skip


def names() -> tuple[str, ...]:
    """The list, without what the installed version does not know."""
    from transformers import CONFIG_MAPPING

    return tuple(name for _, listed in _PATHS for name in listed if name in set(CONFIG_MAPPING.keys()))


def _config(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[name]
    known = cls().to_dict()
    sizes = {key: value for key, value in _SMALL.items() if key in known and not isinstance(known[key], (list, tuple))}
    inner = {
        key: {part: value for part, value in _SMALL.items() if part in known[key]}
        for key in known
        if key.endswith("_config") and isinstance(known[key], dict) and known[key]
    }
    if "use_cache" in known:
        sizes["use_cache"] = False
    return cls(**{**sizes, **inner, **_OPTIONS.get(name, {})})


def _tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, length))


def sample(name: str) -> Sample:
    """A listed architecture, or any other name of the configuration mapping, with the head that its kind calls for."""
    import transformers as tf

    config = _config(name)
    path = next((path for path, listed in _PATHS if name in listed), None)
    if path is None:
        path = next((kind for kind, mapping in _mappings() if type(config) in mapping), "base")
    if path == "own":
        return _own(name, config)
    if path == "text":
        model = tf.AutoModelForSequenceClassification.from_config(config)
        return Sample(model, kwargs={"input_ids": _tokens(), "attention_mask": torch.ones(2, LENGTH, dtype=torch.long)})
    if path == "causal":
        model = tf.AutoModelForCausalLM.from_config(config)
        return Sample(
            model,
            kwargs={"input_ids": _tokens(), "use_cache": False}
            if name != "mamba"
            else {"input_ids": _tokens(), "use_cache": False},
        )
    if path == "seq2seq":
        model = tf.AutoModelForSeq2SeqLM.from_config(config)
        kwargs = {"input_ids": _tokens(), "decoder_input_ids": _tokens(6), "use_cache": False}
        return Sample(model, kwargs=kwargs)
    if path == "image":
        model = (
            tf.AutoModelForImageClassification.from_config(config)
            if name != "deit"
            else tf.DeiTForImageClassification(config)
        )
        return Sample(model, kwargs={"pixel_values": torch.randn(2, 3, 32, 32)})
    if path == "audio":
        model = tf.AutoModelForAudioClassification.from_config(config)
        shape = (
            (2, config.max_length, config.num_mel_bins)
            if hasattr(config, "max_length") and "spectrogram" in name
            else (2, 400)
        )
        return Sample(model, kwargs={"input_values": torch.randn(shape)})
    return Sample(tf.AutoModel.from_config(config), kwargs={"input_ids": _tokens()})


def _mappings() -> tuple[tuple[str, Any], ...]:
    import transformers as tf

    return (
        ("seq2seq", tf.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
        ("causal", tf.MODEL_FOR_CAUSAL_LM_MAPPING),
        ("text", tf.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
        ("image", tf.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING),
        ("audio", tf.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING),
    )


def _own(name: str, config: Any) -> Sample:
    import transformers as tf

    if name == "clip":
        kwargs = {"input_ids": _tokens(), "pixel_values": torch.randn(2, 3, 32, 32)}
        return Sample(tf.CLIPModel(config), kwargs=kwargs, scores=lambda output: output.logits_per_image)
    kwargs = {"input_features": torch.randn(2, 16, 128), "decoder_input_ids": _tokens(6), "use_cache": False}
    return Sample(tf.WhisperForConditionalGeneration(config), kwargs=kwargs)
