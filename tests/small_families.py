"""Tiny random models of families other than those of `headstart.testing`, for what their layers keep."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

ALTERNATING = ["linear_attention", "full_attention"] * 2
SLIDING = ["sliding_attention", "full_attention"] * 2
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1}

CACHED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("Qwen3_5TextConfig", {**DELTA, "layer_types": ALTERNATING}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**DELTA, **MOE, "layer_types": ALTERNATING}),
    "qwen3_next": ("Qwen3NextConfig", {**DELTA, **MOE, "layer_types": ALTERNATING}),
    "olmo_hybrid": ("OlmoHybridConfig", {**DELTA, "layer_types": ALTERNATING}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8}),
    "bamba": ("BambaConfig", {**MAMBA2, "attn_layer_indices": [1, 3]}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **MAMBA2,
            **MOE,
            "layer_types": ["mamba", "attention"] * 2,
            "shared_intermediate_size": 64,
            "logits_scaling": 2.0,
        },
    ),
    "jamba": (
        "JambaConfig",
        {**MOE, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4}
        | {"use_mamba_kernels": False},
    ),
    "mamba": ("MambaConfig", {"state_size": 8, "time_step_rank": 4}),
    "mamba2": ("Mamba2Config", {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8}),
    "falcon_mamba": ("FalconMambaConfig", {"state_size": 8, "time_step_rank": 4}),
    "llama4": ("Llama4TextConfig", {**MOE, "attention_chunk_size": 8, "intermediate_size_mlp": 64}),
    "gpt_oss": ("GptOssConfig", {**MOE, "sliding_window": 8}),
    "gemma3n": (
        "Gemma3nTextConfig",
        {"sliding_window": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 46, "laurel_rank": 8}
        | {"num_kv_shared_layers": 2, "layer_types": SLIDING, "altup_num_inputs": 2},
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {"sliding_window": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 46, "global_head_dim": 16}
        | {"layer_types": SLIDING},
    ),
    "cohere2": ("Cohere2Config", {"sliding_window": 8, "layer_types": SLIDING}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "qwen3_moe": ("Qwen3MoeConfig", MOE),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**MOE, "n_routed_experts": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "n_group": 1}
        | {"topk_group": 1, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1},
    ),
    "bloom": ("BloomConfig", {"n_head": 4, "n_layer": 2}),
}
"""Families that decode from a cache: configuration class and what it needs beside `SHAPE`."""

UNCACHED: dict[str, tuple[str, dict[str, Any]]] = {
    "recurrent_gemma": ("RecurrentGemmaConfig", {"lru_width": 32, "attention_window_size": 8, "logits_soft_cap": 4.0}),
    "rwkv": ("RwkvConfig", {}),
    "minimax": ("MiniMaxConfig", {**MOE, "layer_types": ALTERNATING}),
    "falcon_h1": ("FalconH1Config", {**MAMBA2, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5}),
}
"""Families whose whole texts are computed for every token, and why it is so, is in docs/adr/0016."""

SHAPE: dict[str, Any] = {
    "vocab_size": 46,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def small_model(family: str, seed: int = 0, scale: float = 0.3) -> Any:
    """A float32 model of 46 ids whose matrices are random with standard deviation `scale`."""
    name, more = {**CACHED, **UNCACHED}[family]
    kind = getattr(hf, name)
    known = {key: value for key, value in SHAPE.items() if hasattr(kind(), key)} if family != "gemma4" else SHAPE
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(kind(**{**known, **more}))
    return randomized(model, seed, scale)


def randomized(model: Any, seed: int = 0, scale: float = 0.3) -> Any:
    """`model` with random matrices, so that its distributions are far from uniform."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith("A_log"):
            parameter.data = torch.randn(parameter.shape, generator=draw) * scale
    model.generation_config.eos_token_id = 1
    return model.float().eval()
