"""Architectures of transformers: random weights, tiny configs, no downloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .models import TINY, image, tokens

Factory = Callable[[], tuple[nn.Module, Any]]


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def from_config(model: str, config: Any, inputs: Callable[[], Any], **options: Any) -> Factory:
    """A model class of transformers by name, its config (a class by name, or a function that makes one), its inputs."""

    def make() -> tuple[nn.Module, Any]:
        import transformers

        transformers.logging.set_verbosity_error()
        made = getattr(transformers, config)(**options) if isinstance(config, str) else config(transformers)
        return awake(getattr(transformers, model)(made)), inputs()

    return make


def awake(model: nn.Module) -> nn.Module:
    """Weights and codebooks large enough for a tiny model's output to depend on its input."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for b in model.buffers():
            if b.ndim > 1 and b.is_floating_point() and not b.any():
                b.copy_(torch.randn(b.shape, generator=generator))
        for p in model.parameters():
            if p.ndim > 1 and p.numel() and p.is_floating_point():
                spread, wanted = float(p.std()), float(p[0].numel()) ** -0.5
                if 0 < spread < wanted:
                    p.mul_(wanted / spread)
    return model


def _shifted(parameter: str, by: float, factory: Factory) -> Factory:
    """With a bias raised, where a relu behind it would give nothing but zeros."""

    def make() -> tuple[nn.Module, Any]:
        model, inputs = factory()
        with torch.no_grad():
            model.get_parameter(parameter).add_(by)
        return model, inputs

    return make


def waveform() -> torch.Tensor:
    return floats(2, 2000)


def pair() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(6)}


# --- decoders ---------------------------------------------------------------------------------------------------------

GQA = TINY | {"num_key_value_heads": 2}
PAD = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MOE = GQA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _causal(prefix: str, config: str | None = None, **options: Any) -> Factory:
    return from_config(f"{prefix}ForCausalLM", config or f"{prefix}Config", tokens, **options)


DECODERS: dict[str, Factory] = {
    "apertus": _causal("Apertus", **GQA, **PAD),
    "arcee": _causal("Arcee", **GQA),
    "bamba": _causal("Bamba", **GQA, **PAD, mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, mamba_n_groups=1,
                     attn_layer_indices=[1], mamba_chunk_size=4),
    "biogpt": _causal("BioGpt", **TINY),
    "bitnet": _causal("BitNet", **GQA, **PAD),
    "bloom": _causal("Bloom", hidden_size=64, n_head=4, n_layer=2, vocab_size=100),
    "codegen": _causal("CodeGen", vocab_size=100, n_embd=64, n_head=4, n_layer=2, rotary_dim=8, n_positions=32),
    "cohere": _causal("Cohere", **GQA, **PAD),
    "cohere2": _causal("Cohere2", **GQA, **PAD),
    "ctrl": from_config("CTRLLMHeadModel", "CTRLConfig", tokens, n_embd=64, n_head=4, n_layer=2, dff=128, vocab_size=100),
    "dbrx": from_config(
        "DbrxForCausalLM",
        lambda t: t.DbrxConfig(
            d_model=64, n_heads=4, n_layers=2, vocab_size=100, max_seq_len=32,
            attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        ),
        tokens,
    ),
    "deepseek_v2": _causal("DeepseekV2", **TINY, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
                           first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=16,
                           qk_rope_head_dim=8, v_head_dim=16, n_group=1, topk_group=1, n_shared_experts=1),
    "deepseek_v3": _causal("DeepseekV3", **TINY, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
                           first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=16,
                           qk_rope_head_dim=8, v_head_dim=16, n_group=2, topk_group=1, n_shared_experts=1),
    "diffllama": _causal("DiffLlama", **GQA),
    "doge": _causal("Doge", **GQA),
    "ernie4_5_moe": _causal("Ernie4_5_Moe", **GQA, moe_num_experts=4, moe_k=2, moe_intermediate_size=32,
                            moe_layer_start_index=1, moe_num_shared_experts=1),
    "exaone4": _causal("Exaone4", **GQA),
    "falcon": _causal("Falcon", **{k: v for k, v in TINY.items() if k != "intermediate_size"}),
    "falcon_h1": _causal("FalconH1", **GQA, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16,
                         mamba_n_groups=1, mamba_chunk_size=4),
    "falcon_mamba": _causal("FalconMamba", hidden_size=32, num_hidden_layers=2, state_size=8, vocab_size=100),
    "gemma": _causal("Gemma", **GQA, head_dim=16, **PAD),
    "gemma2": _causal("Gemma2", **GQA, head_dim=16, **PAD),
    "gemma3": _causal("Gemma3", "Gemma3TextConfig", **GQA, head_dim=16, **PAD),
    "glm": _causal("Glm", **GQA, head_dim=16, **PAD),
    "glm4_moe": _causal("Glm4Moe", **GQA, **PAD, head_dim=16, moe_intermediate_size=32, n_routed_experts=4,
                        num_experts_per_tok=2, first_k_dense_replace=1),
    "gpt_bigcode": _causal("GPTBigCode", vocab_size=100, n_embd=64, n_head=4, n_layer=2, n_positions=32),
    "gpt_neo": _causal("GPTNeo", vocab_size=100, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128,
                       attention_types=[[["global", "local"], 1]], max_position_embeddings=32, window_size=4),
    "gpt_neox": _causal("GPTNeoX", **TINY),
    "gpt_oss": _causal("GptOss", **GQA, head_dim=16, num_local_experts=4, num_experts_per_tok=2, **PAD),
    "gptj": _causal("GPTJ", vocab_size=100, n_embd=64, n_head=4, n_layer=2, rotary_dim=8, n_positions=32),
    "granite": _causal("Granite", **GQA),
    "granitemoe": _causal("GraniteMoe", **GQA, num_local_experts=4, num_experts_per_tok=2),
    "granitemoehybrid": _causal("GraniteMoeHybrid", **GQA, num_local_experts=4, num_experts_per_tok=2,
                                shared_intermediate_size=32, layer_types=["mamba", "attention"], mamba_n_heads=8,
                                mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=4),
    "helium": _causal("Helium", **GQA, head_dim=16, **PAD),
    "hunyuan_v1_moe": _causal("HunYuanMoEV1", **GQA, head_dim=16, num_experts=4, moe_topk=2, **PAD),
    "jamba": _causal("Jamba", **GQA, **PAD, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                     expert_layer_offset=1, num_experts=4, num_experts_per_tok=2, mamba_d_state=8, mamba_dt_rank=4,
                     use_mamba_kernels=False),
    "lfm2": _causal("Lfm2", **GQA, **PAD, layer_types=["conv", "full_attention"], block_multiple_of=16),
    "lfm2_moe": _causal("Lfm2Moe", **MOE, **PAD, layer_types=["conv", "full_attention"], num_dense_layers=1),
    "llama4": _causal("Llama4", "Llama4TextConfig", **GQA, **PAD, head_dim=16, num_local_experts=4, intermediate_size_mlp=64,
                      num_experts_per_tok=1),
    "longcat_flash": _causal("LongcatFlash", hidden_size=64, num_attention_heads=4, num_layers=1, vocab_size=100,
                             ffn_hidden_size=64, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16,
                             qk_rope_head_dim=8, v_head_dim=16, head_dim=8, moe_topk=2, n_routed_experts=4,
                             zero_expert_num=2, expert_ffn_hidden_size=32, **PAD),
    "mamba": _causal("Mamba", hidden_size=32, num_hidden_layers=2, state_size=8, vocab_size=100),
    "mamba2": _causal("Mamba2", hidden_size=32, num_hidden_layers=2, state_size=8, vocab_size=100, num_heads=4,
                      head_dim=16, n_groups=1, chunk_size=4, **PAD),
    "minimax": _causal("MiniMax", **GQA, **PAD, head_dim=16, num_local_experts=4, num_experts_per_tok=2, block_size=4,
                       layer_types=["linear_attention", "full_attention"]),
    "mistral": _causal("Mistral", **GQA),
    "mixtral": _causal("Mixtral", **GQA, num_local_experts=4),
    "modernbert_decoder": _causal("ModernBertDecoder", **TINY, **PAD, cls_token_id=1, sep_token_id=2),
    "mpt": _causal("Mpt", d_model=64, n_heads=4, n_layers=2, vocab_size=100, expansion_ratio=2),
    "nanochat": _causal("NanoChat", **GQA, **PAD),
    "nemotron": _causal("Nemotron", **GQA, **PAD),
    "nemotron_h": _causal("NemotronH", **GQA, **PAD, head_dim=16, layers_block_type=["mamba", "attention", "moe"],
                          mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=1, chunk_size=4,
                          n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                          moe_shared_expert_intermediate_size=32),
    "olmo": _causal("Olmo", **GQA, **PAD),
    "olmo2": _causal("Olmo2", **GQA, **PAD),
    "olmoe": _causal("Olmoe", **GQA, **PAD, num_experts=4, num_experts_per_tok=2),
    "openai-gpt": from_config("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", tokens, n_embd=64, n_head=4, n_layer=2,
                              vocab_size=100, n_positions=32),
    "opt": _causal("OPT", vocab_size=100, hidden_size=64, num_hidden_layers=2, ffn_dim=128, num_attention_heads=4,
                   max_position_embeddings=32, word_embed_proj_dim=32),
    "persimmon": _causal("Persimmon", **TINY, **PAD),
    "phi": _causal("Phi", **GQA),
    "phi3": _causal("Phi3", **GQA, **PAD),
    "phimoe": _causal("Phimoe", **GQA, num_local_experts=4),
    "qwen2": _causal("Qwen2", **GQA),
    "qwen2_moe": _causal("Qwen2Moe", **MOE, shared_expert_intermediate_size=32),
    "qwen3": _causal("Qwen3", **GQA, head_dim=16),
    "qwen3_moe": _causal("Qwen3Moe", **MOE, head_dim=16),
    "qwen3_next": _causal("Qwen3Next", **MOE, head_dim=16, layer_types=["linear_attention", "full_attention"],
                          linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
                          linear_value_head_dim=8, shared_expert_intermediate_size=32),
    "recurrent_gemma": _causal("RecurrentGemma", **GQA, **PAD, lru_width=64, attention_window_size=8,
                               block_types=["recurrent", "attention"]),
    "rwkv": _causal("Rwkv", vocab_size=100, hidden_size=64, num_hidden_layers=2, attention_hidden_size=64,
                    intermediate_size=128, context_length=32, use_cache=False),
    "seed_oss": _causal("SeedOss", **GQA, **PAD, head_dim=16),
    "smollm3": _causal("SmolLM3", **GQA, **PAD),
    "stablelm": _causal("StableLm", **GQA, **PAD, use_parallel_residual=True, qk_layernorm=True),
    "starcoder2": _causal("Starcoder2", **GQA, **PAD),
    "xglm": _causal("XGLM", vocab_size=100, d_model=64, ffn_dim=128, num_layers=2, attention_heads=4,
                    max_position_embeddings=32),
    "xlstm": _causal("xLSTM", vocab_size=100, hidden_size=64, num_heads=4, num_blocks=2, qk_dim_factor=1.0, ffn_round_up_to_multiple_of=8,
                     mode="inference", **PAD),
    "zamba2": _causal("Zamba2", **GQA, **PAD, num_mem_blocks=1, layers_block_type=["mamba", "hybrid"], mamba_d_state=16,
                      mamba_ngroups=1, n_mamba_heads=4, mamba_headdim=32, chunk_size=4, use_mem_rope=True,
                      adapter_rank=8),
}  # fmt: skip

# --- encoders ---------------------------------------------------------------------------------------------------------


def _encoder(model: str, config: str, **options: Any) -> Factory:
    return from_config(model, config, tokens, **options)


def boxes() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(), "bbox": torch.full((2, 8, 4), 50)}  # any other box drawn at random must have a size


ENCODERS: dict[str, Factory] = {
    "albert": _encoder("AlbertModel", "AlbertConfig", **TINY, embedding_size=32),
    "big_bird": _encoder("BigBirdModel", "BigBirdConfig", **TINY, attention_type="original_full"),
    "canine": _encoder("CanineModel", "CanineConfig", **TINY, num_hash_buckets=128, local_transformer_stride=8,
                       max_position_embeddings=128, downsampling_rate=4),
    "convbert": _encoder("ConvBertModel", "ConvBertConfig", **TINY, embedding_size=32),
    "deberta": _encoder("DebertaModel", "DebertaConfig", **TINY, relative_attention=True, max_relative_positions=16,
                        pos_att_type=["c2p", "p2c"], position_biased_input=False),
    "deberta_v2": _encoder("DebertaV2Model", "DebertaV2Config", **TINY, relative_attention=True, position_buckets=8,
                           pos_att_type=["c2p", "p2c"], norm_rel_ebd="layer_norm", share_att_key=True,
                           conv_kernel_size=3, conv_act="gelu"),
    "distilbert": _encoder("DistilBertModel", "DistilBertConfig", vocab_size=100, dim=64, n_heads=4, n_layers=2,
                           hidden_dim=128),
    "electra": _encoder("ElectraForSequenceClassification", "ElectraConfig", **TINY, embedding_size=32),
    "ernie": _encoder("ErnieModel", "ErnieConfig", **TINY),
    "esm": _encoder("EsmModel", "EsmConfig", **TINY, pad_token_id=1, position_embedding_type="rotary",
                    max_position_embeddings=32),
    "eurobert": _encoder("EuroBertModel", "EuroBertConfig", **GQA, **PAD),
    "flaubert": _encoder("FlaubertModel", "FlaubertConfig", vocab_size=100, emb_dim=64, n_layers=2, n_heads=4),
    "fnet": _encoder("FNetModel", "FNetConfig", vocab_size=100, hidden_size=64, num_hidden_layers=2,
                     intermediate_size=128),
    "funnel": _encoder("FunnelModel", "FunnelConfig", vocab_size=100, block_sizes=[1, 1], num_decoder_layers=1, d_model=64,
                       n_head=4, d_head=16, d_inner=128),
    "ibert": _encoder("IBertModel", "IBertConfig", **TINY),
    "layoutlm": from_config("LayoutLMModel", "LayoutLMConfig", boxes, **TINY, max_2d_position_embeddings=128),
    "lilt": from_config("LiltModel", "LiltConfig", boxes, **TINY | {"hidden_size": 96}, max_2d_position_embeddings=128, channel_shrink_ratio=2),
    "longformer": _encoder("LongformerModel", "LongformerConfig", **TINY, attention_window=4, pad_token_id=0),
    "megatron_bert": _encoder("MegatronBertModel", "MegatronBertConfig", **TINY),
    "mobilebert": _encoder("MobileBertModel", "MobileBertConfig", **TINY, embedding_size=32, true_hidden_size=32,
                           intra_bottleneck_size=32),
    "modernbert": _encoder("ModernBertModel", "ModernBertConfig", **TINY, **PAD, cls_token_id=1, sep_token_id=2,
                           attn_implementation="sdpa"),
    "mpnet": _encoder("MPNetModel", "MPNetConfig", **TINY),
    "nystromformer": _encoder("NystromformerModel", "NystromformerConfig", **TINY, num_landmarks=4, segment_means_seq_len=8,
                              conv_kernel_size=3),
    "reformer": _encoder("ReformerModel", "ReformerConfig", vocab_size=100, hidden_size=64, num_attention_heads=4,
                         attention_head_size=16, feed_forward_size=128, attn_layers=["local", "local"],
                         local_attn_chunk_length=4, axial_pos_shape=[2, 4], axial_pos_embds_dim=[32, 32],
                         max_position_embeddings=8, is_decoder=False),
    "rembert": _encoder("RemBertModel", "RemBertConfig", **TINY, input_embedding_size=32, output_embedding_size=48),
    "roberta": _encoder("RobertaForSequenceClassification", "RobertaConfig", **TINY, max_position_embeddings=32),
    "roformer": _encoder("RoFormerModel", "RoFormerConfig", **TINY, embedding_size=32),
    "squeezebert": _encoder("SqueezeBertModel", "SqueezeBertConfig", **TINY, embedding_size=64),
    "tapas": from_config(
        "TapasModel", "TapasConfig",
        lambda: {"input_ids": tokens(), "token_type_ids": torch.zeros(2, 8, 7, dtype=torch.long)}, **TINY,
        type_vocab_sizes=[3, 8, 8, 2, 4, 4, 4],
    ),
    "xlm": _encoder("XLMModel", "XLMConfig", vocab_size=100, emb_dim=64, n_layers=2, n_heads=4),
    "xlnet": _encoder("XLNetModel", "XLNetConfig", vocab_size=100, d_model=64, n_layer=2, n_head=4, d_inner=128),
    "xmod": _encoder("XmodModel", "XmodConfig", **TINY, max_position_embeddings=32, default_language="en_XX"),
    "yoso": _encoder("YosoModel", "YosoConfig", **TINY, use_expectation=True),
    "perceiver": from_config(
        "PerceiverModel", "PerceiverConfig", lambda: floats(2, 8, 24), d_model=24, d_latents=32, num_latents=4,
        num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=2, num_cross_attention_heads=2,
    ),
}  # fmt: skip

# --- encoders with decoders -------------------------------------------------------------------------------------------

BART = {
    "vocab_size": 100, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
T5 = {"vocab_size": 100, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}

SEQ2SEQ: dict[str, Factory] = {
    "bart": from_config("BartForConditionalGeneration", "BartConfig", pair, **BART),
    "bigbird_pegasus": from_config("BigBirdPegasusForConditionalGeneration", "BigBirdPegasusConfig", pair, **BART,
                                   attention_type="original_full"),
    "blenderbot_small": from_config("BlenderbotSmallForConditionalGeneration", "BlenderbotSmallConfig", pair, **BART),
    "fsmt": from_config("FSMTForConditionalGeneration", "FSMTConfig", pair, src_vocab_size=100, tgt_vocab_size=100,
                        **{k: v for k, v in BART.items() if k not in ("vocab_size",)}, langs=["en", "de"]),
    "led": from_config("LEDForConditionalGeneration", "LEDConfig", pair, **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
                       attention_window=[4, 4], max_encoder_position_embeddings=64, max_decoder_position_embeddings=64),
    "longt5": from_config("LongT5ForConditionalGeneration", "LongT5Config", pair, **T5, local_radius=3),
    "longt5_global": from_config("LongT5ForConditionalGeneration", "LongT5Config", pair, **T5, local_radius=3,
                                 encoder_attention_type="transient-global", global_block_size=4),
    "m2m_100": from_config("M2M100ForConditionalGeneration", "M2M100Config", pair, **BART),
    "marian": from_config("MarianMTModel", "MarianConfig", pair, **BART),
    "mbart": from_config("MBartForConditionalGeneration", "MBartConfig", pair, **BART),
    "mvp": from_config("MvpForConditionalGeneration", "MvpConfig", pair, **BART),
    "nllb_moe": from_config("NllbMoeForConditionalGeneration", "NllbMoeConfig", pair, **BART, num_experts=4,
                            encoder_sparse_step=2, decoder_sparse_step=2),
    "pegasus": from_config("PegasusForConditionalGeneration", "PegasusConfig", pair, **BART),
    "pegasus_x": from_config("PegasusXForConditionalGeneration", "PegasusXConfig", pair, **BART, block_size=4,
                             num_global_tokens=2),
    "plbart": from_config("PLBartForConditionalGeneration", "PLBartConfig", pair, **BART),
    "prophetnet": from_config("ProphetNetForConditionalGeneration", "ProphetNetConfig", pair, vocab_size=100, hidden_size=64,
                              num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
                              num_decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128,
                              max_position_embeddings=64, ngram=2, num_buckets=8, relative_max_distance=16, **PAD),
    "switch_transformers": from_config("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", pair, **T5,
                                       num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4,
                                       expert_capacity=16),
    "t5gemma": from_config(
        "T5GemmaForConditionalGeneration",
        lambda t: t.T5GemmaConfig(
            encoder=t.T5GemmaModuleConfig(**GQA, head_dim=16, **PAD),
            decoder=t.T5GemmaModuleConfig(**GQA, head_dim=16, **PAD, cross_attention_hidden_size=64, is_decoder=True),
            vocab_size=100,
        ),
        pair,
    ),
    "umt5": from_config("UMT5ForConditionalGeneration", "UMT5Config", pair, **T5),
    "encoder_decoder": from_config(
        "EncoderDecoderModel",
        lambda t: t.EncoderDecoderConfig.from_encoder_decoder_configs(t.BertConfig(**TINY), t.BertConfig(**TINY)), pair,
    ),
}  # fmt: skip

# --- vision -----------------------------------------------------------------------------------------------------------

VIT = {
    "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def picture() -> torch.Tensor:
    return image(32)


def large_picture() -> torch.Tensor:
    return image(64)


def video() -> torch.Tensor:
    return floats(2, 4, 3, 32, 32)


VISION: dict[str, Factory] = {
    "aimv2": from_config("Aimv2VisionModel", "Aimv2VisionConfig", picture, **VIT),
    "beit": from_config("BeitForImageClassification", "BeitConfig", picture, **VIT, use_relative_position_bias=True),
    "bit": from_config("BitForImageClassification", "BitConfig", picture, embedding_size=32, hidden_sizes=[32, 64],
                       depths=[1, 1], num_groups=4),
    "convnext": from_config("ConvNextForImageClassification", "ConvNextConfig", large_picture, hidden_sizes=[16, 32],
                            depths=[1, 1], num_stages=2),
    "convnextv2": from_config("ConvNextV2ForImageClassification", "ConvNextV2Config", large_picture, hidden_sizes=[16, 32],
                              depths=[1, 1], num_stages=2),
    "cvt": from_config("CvtForImageClassification", "CvtConfig", large_picture, embed_dim=[16, 32, 32], num_heads=[1, 2, 2],
                       depth=[1, 2, 3], drop_path_rate=[0.0, 0.0, 0.1]),
    "data2vec_vision": from_config("Data2VecVisionForImageClassification", "Data2VecVisionConfig", picture, **VIT,
                                   use_relative_position_bias=True),
    "deit": from_config("DeiTForImageClassificationWithTeacher", "DeiTConfig", picture, **VIT),
    "depth_anything": _shifted("head.conv3.bias", 5.0, from_config(
        "DepthAnythingForDepthEstimation",
        lambda t: t.DepthAnythingConfig(
            backbone_config=t.Dinov2Config(**VIT, out_indices=[1, 2], reshape_hidden_states=False),
            reassemble_hidden_size=64, patch_size=8, reassemble_factors=[2, 1], neck_hidden_sizes=[16, 24],
            fusion_hidden_size=16, head_hidden_size=8,
        ),
        picture,
    )),
    "dinov2": from_config("Dinov2ForImageClassification", "Dinov2Config", picture, **VIT),
    "dinov2_registers": from_config("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", picture,
                                    **VIT),
    "dinov3_vit": from_config("DINOv3ViTModel", "DINOv3ViTConfig", picture, **VIT, use_gated_mlp=True),
    "dpt": from_config("DPTForDepthEstimation", "DPTConfig", picture, **VIT | {"num_hidden_layers": 4}, backbone_out_indices=[0, 1, 2, 3],
                       neck_hidden_sizes=[16, 16, 32, 32], fusion_hidden_size=16),
    "efficientnet": from_config(
        "EfficientNetForImageClassification", "EfficientNetConfig", picture, width_coefficient=0.5, depth_coefficient=0.5,
        image_size=32, kernel_sizes=[3, 3, 5], in_channels=[32, 16, 24], out_channels=[16, 24, 40], strides=[1, 2, 2],
        num_block_repeats=[1, 1, 1], expand_ratios=[1, 4, 4], depthwise_padding=[], hidden_dim=640, depth_divisor=8,
    ),
    "focalnet": from_config("FocalNetForImageClassification", "FocalNetConfig", large_picture, image_size=64, embed_dim=16,
                            hidden_sizes=[16, 32], depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3]),
    "glpn": from_config("GLPNForDepthEstimation", "GLPNConfig", large_picture, num_encoder_blocks=4, depths=[1, 1, 1, 1],
                        hidden_sizes=[16, 32, 32, 64], sr_ratios=[4, 2, 1, 1], num_attention_heads=[1, 2, 2, 4],
                        decoder_hidden_size=16),
    "hiera": from_config("HieraForImageClassification", "HieraConfig", large_picture, embed_dim=16, image_size=[64, 64],
                         patch_stride=[4, 4], patch_size=[7, 7], patch_padding=[3, 3], masked_unit_size=[8, 8],
                         depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], embed_dim_multiplier=2.0, num_query_pool=3,
                         query_stride=[2, 2]),
    "ijepa": from_config("IJepaForImageClassification", "IJepaConfig", picture, **VIT),
    "imagegpt": from_config("ImageGPTModel", "ImageGPTConfig", tokens, vocab_size=100, n_positions=32, n_embd=64, n_layer=2,
                            n_head=4),
    "levit": from_config("LevitForImageClassification", "LevitConfig", lambda: image(64), image_size=64,
                         hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[8, 8, 8]),
    "mobilenet_v1": from_config("MobileNetV1ForImageClassification", "MobileNetV1Config", picture, depth_multiplier=0.25),
    "mobilenet_v2": from_config("MobileNetV2ForImageClassification", "MobileNetV2Config", picture, depth_multiplier=0.35),
    "mobilevit": from_config("MobileViTForImageClassification", "MobileViTConfig", large_picture, image_size=64,
                             hidden_sizes=[32, 40, 48], neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 64],
                             num_attention_heads=4),
    "mobilevitv2": from_config("MobileViTV2ForImageClassification", "MobileViTV2Config", large_picture, image_size=64,
                               width_multiplier=0.25, n_attn_blocks=[1, 1, 1],
                               base_attn_unit_dims=[64, 96, 128]),
    "poolformer": from_config("PoolFormerForImageClassification", "PoolFormerConfig", large_picture, depths=[1, 1, 1, 1],
                              hidden_sizes=[16, 32, 32, 64]),
    "prompt_depth_anything": from_config(
        "PromptDepthAnythingForDepthEstimation",
        lambda t: t.PromptDepthAnythingConfig(
            backbone_config=t.Dinov2Config(**VIT, out_indices=[1, 2], reshape_hidden_states=False),
            reassemble_hidden_size=64, patch_size=8, reassemble_factors=[2, 1], neck_hidden_sizes=[16, 24],
            fusion_hidden_size=16, head_hidden_size=8,
        ),
        lambda: {"pixel_values": picture(), "prompt_depth": floats(2, 1, 8, 8)},
    ),
    "pvt": from_config("PvtForImageClassification", "PvtConfig", large_picture, image_size=64, depths=[1, 1, 1, 1],
                       hidden_sizes=[16, 32, 32, 64], num_attention_heads=[1, 2, 2, 4], mlp_ratios=[2, 2, 2, 2]),
    "pvt_v2": from_config("PvtV2ForImageClassification", "PvtV2Config", large_picture, image_size=64, depths=[1, 1, 1, 1],
                          hidden_sizes=[16, 32, 32, 64], num_attention_heads=[1, 2, 2, 4], mlp_ratios=[2, 2, 2, 2]),
    "regnet_hf": from_config("RegNetForImageClassification", "RegNetConfig", picture, embedding_size=16,
                             hidden_sizes=[16, 32, 32, 64], depths=[1, 1, 1, 1], groups_width=8),
    "resnet_hf": from_config("ResNetForImageClassification", "ResNetConfig", picture, embedding_size=16,
                             hidden_sizes=[16, 32, 32, 64], depths=[1, 1, 1, 1]),
    "segformer": from_config("SegformerForSemanticSegmentation", "SegformerConfig", large_picture, depths=[1, 1, 1, 1],
                             hidden_sizes=[16, 32, 32, 64], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=32),
    "swiftformer": from_config("SwiftFormerForImageClassification", "SwiftFormerConfig", large_picture, image_size=64,
                               depths=[1, 1, 1, 1], embed_dims=[16, 32, 32, 64]),
    "swin_hf": from_config("SwinForImageClassification", "SwinConfig", large_picture, image_size=64, embed_dim=16,
                           depths=[2, 2], num_heads=[2, 4], window_size=4, patch_size=4),
    "swin2sr": from_config("Swin2SRForImageSuperResolution", "Swin2SRConfig", picture, image_size=32, embed_dim=16,
                           depths=[2], num_heads=[2], window_size=4),
    "swinv2": from_config("Swinv2ForImageClassification", "Swinv2Config", large_picture, image_size=64, embed_dim=16,
                          depths=[2, 2], num_heads=[2, 4], window_size=4, patch_size=4),
    "textnet": from_config("TextNetForImageClassification", "TextNetConfig", large_picture),
    "timesformer": from_config("TimesformerForVideoClassification", "TimesformerConfig", video, **VIT, num_frames=4),
    "upernet": from_config(
        "UperNetForSemanticSegmentation",
        lambda t: t.UperNetConfig(
            backbone_config=t.ConvNextConfig(hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1],
                                             out_features=["stage1", "stage2", "stage3", "stage4"]),
            hidden_size=32, auxiliary_in_channels=32, auxiliary_channels=16,
        ),
        large_picture,
    ),
    "videomae": from_config("VideoMAEForVideoClassification", "VideoMAEConfig", video, **VIT, num_frames=4),
    "vitdet": from_config("VitDetModel", "VitDetConfig", picture, hidden_size=64, num_attention_heads=4, num_hidden_layers=2,
                          image_size=32, pretrain_image_size=32, patch_size=8, window_size=2, window_block_indices=[0],
                          use_relative_position_embeddings=True),
    "vit_mae": from_config("ViTMAEModel", "ViTMAEConfig",
                           lambda: {"pixel_values": picture(), "noise": torch.rand(2, 16)}, **VIT),
    "vitmatte": from_config(
        "VitMatteForImageMatting",
        lambda t: t.VitMatteConfig(
            backbone_config=t.VitDetConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, image_size=64,
                                           pretrain_image_size=64, num_channels=4, patch_size=16, out_features=["stage2"]),
            hidden_size=32, convstream_hidden_sizes=[8, 16, 24], fusion_hidden_sizes=[32, 16, 16, 8],
        ),
        lambda: floats(2, 4, 64, 64),
    ),
    "vitpose": from_config(
        "VitPoseForPoseEstimation",
        lambda t: t.VitPoseConfig(
            backbone_config=t.VitPoseBackboneConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2,
                                                    image_size=[32, 32], patch_size=[8, 8], out_features=["stage2"],
                                                    out_indices=[2]),
            num_labels=5, scale_factor=4, use_simple_decoder=False,
        ),
        picture,
    ),
    "vivit": from_config("VivitForVideoClassification", "VivitConfig", video,
                         **{k: v for k, v in VIT.items() if k != "patch_size"}, num_frames=4, tubelet_size=[2, 8, 8]),
    "vjepa2": from_config("VJEPA2Model", "VJEPA2Config", video, crop_size=32, frames_per_clip=4, hidden_size=48, patch_size=8,
                          num_attention_heads=4, num_hidden_layers=2, pred_hidden_size=48, pred_num_attention_heads=4,
                          pred_num_hidden_layers=2, mlp_ratio=2, pred_mlp_ratio=2),
}  # fmt: skip

# --- detection and segmentation ---------------------------------------------------------------------------------------

DETR = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 6, "num_labels": 5, "use_timm_backbone": False,
    "use_pretrained_backbone": False, "backbone": None,
}  # fmt: skip


def _backbone(t: Any, **options: Any) -> Any:
    return t.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"], **options,
    )  # fmt: skip


def _detr(config: str, **options: Any) -> Callable[[Any], Any]:
    return lambda t: getattr(t, config)(**DETR | options, backbone_config=_backbone(t))


def _hgnet(t: Any) -> Any:
    return t.HGNetV2Config(
        stem_channels=[3, 8, 8], stage_in_channels=[8, 16, 24, 32], stage_mid_channels=[8, 8, 12, 16],
        stage_out_channels=[16, 24, 32, 48], stage_num_blocks=[1, 1, 1, 1], stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True], stage_kernel_size=[3, 3, 5, 5], stage_numb_of_layers=[2, 2, 2, 2],
        embedding_size=8, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"], out_indices=[2, 3, 4],
    )  # fmt: skip


RTDETR = {
    "d_model": 32, "encoder_hidden_dim": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 6, "num_labels": 5,
    "decoder_n_points": 2, "num_denoising": 0, "decoder_in_channels": [32, 32, 32],
}  # fmt: skip

DETECTION: dict[str, Factory] = {
    "conditional_detr": from_config("ConditionalDetrForObjectDetection", _detr("ConditionalDetrConfig"), large_picture),
    "dab_detr": from_config(
        "DabDetrForObjectDetection",
        lambda t: t.DabDetrConfig(
            hidden_size=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=6, num_labels=5, use_timm_backbone=False, backbone=None,
            use_pretrained_backbone=False, backbone_config=_backbone(t),
        ),
        large_picture,
    ),
    "deformable_detr": from_config(
        "DeformableDetrForObjectDetection", _detr("DeformableDetrConfig", encoder_n_points=2, decoder_n_points=2),
        large_picture,
    ),
    "detr": from_config("DetrForObjectDetection", _detr("DetrConfig"), large_picture),
    "detr_segmentation": from_config("DetrForSegmentation", _detr("DetrConfig", d_model=32, encoder_attention_heads=8, decoder_attention_heads=8), large_picture),
    "d_fine": from_config(
        "DFineForObjectDetection",
        lambda t: t.DFineConfig(backbone_config=_hgnet(t), encoder_in_channels=[24, 32, 48], feat_strides=[8, 16, 32],
                                num_feature_levels=3, eval_idx=-1, max_num_bins=8, reg_max=8,
                                **RTDETR | {"decoder_n_points": [2, 2, 2]}),
        large_picture,
    ),
    "deimv2": from_config(
        "Deimv2ForObjectDetection",
        lambda t: t.Deimv2Config(backbone_config=_hgnet(t), encoder_in_channels=[24, 32, 48], feat_strides=[8, 16, 32],
                                 num_feature_levels=3, eval_idx=-1, max_num_bins=8, **RTDETR),
        large_picture,
    ),
    "rt_detr": from_config(
        "RTDetrForObjectDetection",
        lambda t: t.RTDetrConfig(
            backbone_config=t.RTDetrResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1],
                                                 out_features=["stage2", "stage3", "stage4"]),
            encoder_in_channels=[16, 24, 32], **RTDETR,
        ),
        large_picture,
    ),
    "mask2former": from_config(
        "Mask2FormerForUniversalSegmentation",
        lambda t: t.Mask2FormerConfig(
            backbone_config=t.SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4],
                                         window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"]),
            feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=1, decoder_layers=2,
            num_attention_heads=4, dim_feedforward=64, encoder_feedforward_dim=64, num_queries=6, num_labels=5,
        ),
        large_picture,
    ),
    "maskformer": from_config(
        "MaskFormerForInstanceSegmentation",
        lambda t: t.MaskFormerConfig(
            backbone_config=t.SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4],
                                         window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"]),
            decoder_config=t.DetrConfig(**DETR), fpn_feature_size=32, mask_feature_size=32, num_labels=5,
        ),
        large_picture,
    ),
    "sam": from_config(
        "SamModel",
        lambda t: t.SamConfig(
            vision_config=t.SamVisionConfig(hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=2,
                                            image_size=32, patch_size=8, window_size=2, global_attn_indexes=[1],
                                            mlp_dim=64, num_pos_feats=8),
            prompt_encoder_config=t.SamPromptEncoderConfig(hidden_size=16, image_size=32, patch_size=8,
                                                           mask_input_channels=4),
            mask_decoder_config=t.SamMaskDecoderConfig(hidden_size=16, mlp_dim=32, num_hidden_layers=2,
                                                       num_attention_heads=2, iou_head_hidden_dim=16,
                                                       iou_head_depth=2),
        ),
        lambda: {"pixel_values": picture(), "input_points": torch.rand(2, 1, 2, 2) * 30},
    ),
    "superpoint": from_config("SuperPointForKeypointDetection", "SuperPointConfig", large_picture,
                              keypoint_threshold=0.0, max_keypoints=20, encoder_hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=16, keypoint_decoder_dim=65,
                              descriptor_decoder_dim=16),
    "table_transformer": from_config("TableTransformerForObjectDetection", _detr("TableTransformerConfig"), large_picture),
    "yolos": from_config("YolosForObjectDetection", "YolosConfig", picture, **VIT | {"image_size": [32, 32]},
                         num_detection_tokens=4, num_labels=5),
}  # fmt: skip

# --- sound ------------------------------------------------------------------------------------------------------------

WAV = TINY | {
    "conv_dim": [16, 16, 16], "conv_kernel": [10, 3, 3], "conv_stride": [5, 2, 2], "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "pad_token_id": 0,
}  # fmt: skip

AUDIO: dict[str, Factory] = {
    "audio_spectrogram_transformer": from_config(
        "ASTForAudioClassification", "ASTConfig", lambda: floats(2, 24, 16),
        **{k: v for k, v in VIT.items() if k != "image_size"}, max_length=24, num_mel_bins=16, frequency_stride=8,
        time_stride=8,
    ),
    "dac": from_config("DacModel", "DacConfig", lambda: floats(2, 1, 256), encoder_hidden_size=8, decoder_hidden_size=32,
                       downsampling_ratios=[2, 4], upsampling_ratios=[4, 2], n_codebooks=2, codebook_size=16,
                       codebook_dim=4, hidden_size=32),
    "encodec": from_config("EncodecModel", "EncodecConfig", lambda: floats(2, 1, 640), num_filters=8, hidden_size=32,
                           upsampling_ratios=[4, 2], codebook_size=16, codebook_dim=32, num_lstm_layers=1),
    "fastspeech2_conformer": from_config(
        "FastSpeech2ConformerModel", "FastSpeech2ConformerConfig", tokens, hidden_size=32, vocab_size=100, num_mel_bins=16,
        encoder_num_attention_heads=2, encoder_layers=1, encoder_linear_units=64, decoder_layers=1,
        decoder_num_attention_heads=2, decoder_linear_units=64, speech_decoder_postnet_units=16,
        speech_decoder_postnet_layers=2, duration_predictor_channels=16, energy_predictor_channels=16,
        pitch_predictor_channels=16, duration_predictor_layers=1,
    ),
    "hubert": from_config("HubertModel", "HubertConfig", waveform, **WAV),
    "mimi": from_config("MimiModel", "MimiConfig", lambda: floats(2, 1, 512), num_filters=8, hidden_size=32,
                        upsampling_ratios=[4, 2], codebook_size=16, codebook_dim=16, vector_quantization_hidden_dimension=16,
                        num_quantizers=2, num_semantic_quantizers=1, num_hidden_layers=1, num_attention_heads=2,
                        num_key_value_heads=2, head_dim=16, intermediate_size=64, upsample_groups=32, sliding_window=8),
    "moonshine": from_config(
        "MoonshineForConditionalGeneration", "MoonshineConfig",
        lambda: {"input_values": floats(2, 2000), "decoder_input_ids": tokens(4)}, vocab_size=100, hidden_size=32,
        intermediate_size=64, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1, encoder_num_attention_heads=2,
        decoder_num_attention_heads=2, **PAD,
    ),
    "sew": from_config("SEWModel", "SEWConfig", waveform, **WAV, squeeze_factor=2),
    "sew_d": from_config("SEWDModel", "SEWDConfig", waveform, **WAV, squeeze_factor=2, max_position_embeddings=64,
                         position_buckets=8),
    "speech_to_text": from_config(
        "Speech2TextForConditionalGeneration", "Speech2TextConfig",
        lambda: {"input_features": floats(2, 32, 16), "decoder_input_ids": tokens(4)},
        **{k: v for k, v in BART.items() if k != "max_position_embeddings"}, conv_channels=32, input_feat_per_channel=16,
    ),
    "speecht5": from_config(
        "SpeechT5ForSpeechToText", "SpeechT5Config",
        lambda: {"input_values": waveform(), "decoder_input_ids": tokens(4)}, vocab_size=100, hidden_size=64,
        encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, decoder_layers=2, decoder_attention_heads=4,
        decoder_ffn_dim=128, conv_dim=[16, 16], conv_stride=[5, 4], conv_kernel=[10, 4], num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4,
    ),
    "unispeech_sat": from_config("UniSpeechSatModel", "UniSpeechSatConfig", waveform, **WAV),
    "univnet": from_config("UnivNetModel", "UnivNetConfig", lambda: floats(2, 12, 16), model_in_channels=8,
                           model_hidden_channels=8, num_mel_bins=16, kernel_predictor_hidden_channels=8,
                           resblock_kernel_sizes=[3, 3], resblock_stride_sizes=[4, 4], resblock_dilation_sizes=[[1, 3], [1, 3]],
                           kernel_predictor_num_blocks=1),
    "vits": from_config(
        "VitsModel", "VitsConfig", tokens, vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        window_size=2, ffn_dim=32, flow_size=16, spectrogram_bins=17, upsample_initial_channel=32,
        upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]],
        duration_predictor_num_flows=2, duration_predictor_filter_channels=16, prior_encoder_num_flows=2,
        posterior_encoder_num_wavenet_layers=2, prior_encoder_num_wavenet_layers=2, depth_separable_num_layers=2,
        noise_scale=0.0, noise_scale_duration=0.0,
    ),
    "wav2vec2": from_config("Wav2Vec2ForCTC", "Wav2Vec2Config", waveform, **WAV),
    "wav2vec2_stable": from_config("Wav2Vec2Model", "Wav2Vec2Config", waveform, **WAV, do_stable_layer_norm=True,
                                   feat_extract_norm="layer", add_adapter=True, num_adapter_layers=1),
    "wav2vec2_bert": from_config("Wav2Vec2BertModel", "Wav2Vec2BertConfig", lambda: floats(2, 12, 24), **TINY,
                                 feature_projection_input_dim=24, conv_depthwise_kernel_size=3),
    "wav2vec2_conformer": from_config("Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", waveform, **WAV,
                                      position_embeddings_type="rotary", conv_depthwise_kernel_size=3),
    "wav2vec2_conformer_relative": from_config("Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", waveform, **WAV,
                                               conv_depthwise_kernel_size=3, position_embeddings_type="relative"),
    "wavlm": from_config("WavLMModel", "WavLMConfig", waveform, **WAV),
    "whisper": from_config(
        "WhisperForConditionalGeneration", "WhisperConfig",
        lambda: {"input_features": floats(2, 16, 24), "decoder_input_ids": tokens(4)},
        **{k: v for k, v in BART.items() if k != "max_position_embeddings"}, num_mel_bins=16, max_source_positions=12,
        max_target_positions=16,
    ),
}  # fmt: skip

# --- several kinds of input -------------------------------------------------------------------------------------------

VISION_TOWER = {
    "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TEXT_TOWER = {
    "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100,
}  # fmt: skip


def words_and_picture() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(), "pixel_values": picture(), "attention_mask": torch.ones(2, 8, dtype=torch.long)}


def _with_image_tokens(count: int, marker: int) -> torch.Tensor:
    ids = tokens(4) % 90
    return torch.cat([ids[:, :1], torch.full((2, count), marker), ids[:, 1:]], 1)


def _two_towers(config: str, **options: Any) -> Callable[[Any], Any]:
    def make(t: Any) -> Any:
        towers = {
            "text_config": TEXT_TOWER | {"max_position_embeddings": 32, **PAD}, "vision_config": VISION_TOWER,
        }  # fmt: skip
        return getattr(t, config)(**towers, **options)

    return make


MULTIMODAL: dict[str, Factory] = {
    "altclip": from_config("AltCLIPModel", _two_towers("AltCLIPConfig", projection_dim=24), words_and_picture),
    "blip": from_config(
        "BlipForConditionalGeneration",
        lambda t: t.BlipConfig(
            text_config=TEXT_TOWER | {"encoder_hidden_size": 32, "max_position_embeddings": 32},
            vision_config=VISION_TOWER, projection_dim=24,
        ),
        words_and_picture,
    ),
    "blip_2": from_config(
        "Blip2ForConditionalGeneration",
        lambda t: t.Blip2Config(
            vision_config=VISION_TOWER,
            qformer_config=TEXT_TOWER | {"encoder_hidden_size": 32, "cross_attention_frequency": 1},
            text_config={"model_type": "opt", "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64,
                         "num_attention_heads": 2, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
            num_query_tokens=4, image_token_index=99,
        ),
        lambda: {"pixel_values": picture(), "input_ids": _with_image_tokens(4, 99)},
    ),
    "chinese_clip": from_config("ChineseCLIPModel", _two_towers("ChineseCLIPConfig", projection_dim=24),
                                words_and_picture),
    "clip": from_config("CLIPModel", _two_towers("CLIPConfig", projection_dim=24), words_and_picture),
    "clipseg": from_config(
        "CLIPSegForImageSegmentation",
        _two_towers("CLIPSegConfig", projection_dim=24, extract_layers=[0, 1], reduce_dim=16,
                    decoder_num_attention_heads=2, decoder_intermediate_size=32),
        words_and_picture,
    ),
    "flava": from_config(
        "FlavaModel",
        lambda t: t.FlavaConfig(
            image_config=VISION_TOWER, text_config=TEXT_TOWER, multimodal_config=VISION_TOWER, hidden_size=32,
            projection_dim=24,
        ),
        words_and_picture,
    ),
    "git": from_config(
        "GitForCausalLM",
        lambda t: t.GitConfig(vision_config=VISION_TOWER, **TEXT_TOWER, max_position_embeddings=64, **PAD),
        lambda: {"input_ids": tokens(), "pixel_values": picture()},
    ),
    "grounding_dino": from_config(
        "GroundingDinoForObjectDetection",
        lambda t: t.GroundingDinoConfig(
            backbone_config=t.SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4],
                                         window_size=4, out_features=["stage2", "stage3", "stage4"]),
            text_config=t.BertConfig(**TEXT_TOWER), use_timm_backbone=False, backbone=None, d_model=32, encoder_layers=1,
            decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
            num_queries=6, encoder_n_points=2, decoder_n_points=2, max_text_len=16, disable_custom_kernels=True,
        ),
        lambda: {"pixel_values": large_picture(), "input_ids": tokens(), "attention_mask": torch.ones(2, 8, dtype=torch.long),
                 "token_type_ids": torch.zeros(2, 8, dtype=torch.long)},
    ),
    "groupvit": from_config(
        "GroupViTModel",
        lambda t: t.GroupViTConfig(
            text_config=TEXT_TOWER | {"max_position_embeddings": 32},
            vision_config=VISION_TOWER | {"depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [4, 2],
                                          "num_hidden_layers": 2},
            projection_dim=24, projection_intermediate_dim=48,
        ),
        words_and_picture,
    ),
    "idefics3": from_config(
        "Idefics3ForConditionalGeneration",
        lambda t: t.Idefics3Config(
            text_config=t.LlamaConfig(**TEXT_TOWER, num_key_value_heads=2, **PAD), vision_config=VISION_TOWER,
            image_token_id=99, scale_factor=2,
        ),
        lambda: {"input_ids": _with_image_tokens(4, 99), "pixel_values": picture()[:, None]},
    ),
    "instructblip": from_config(
        "InstructBlipForConditionalGeneration",
        lambda t: t.InstructBlipConfig(
            vision_config=VISION_TOWER,
            qformer_config=TEXT_TOWER | {"encoder_hidden_size": 32, "cross_attention_frequency": 1},
            text_config={"model_type": "opt", "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64,
                         "num_attention_heads": 2, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
            num_query_tokens=4, image_token_index=99,
        ),
        lambda: {"pixel_values": picture(), "qformer_input_ids": tokens(), "input_ids": _with_image_tokens(4, 99)},
    ),
    "kosmos2": from_config(
        "Kosmos2ForConditionalGeneration",
        lambda t: t.Kosmos2Config(
            text_config={"vocab_size": 100, "embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 2,
                         "max_position_embeddings": 64},
            vision_config=VISION_TOWER, latent_query_num=4,
        ),
        lambda: {"pixel_values": picture(), "input_ids": tokens(),
                 "image_embeds_position_mask": torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0]] * 2)},
    ),
    "layoutlmv3": from_config(
        "LayoutLMv3Model", "LayoutLMv3Config", lambda: boxes() | {"pixel_values": picture()}, **TINY, input_size=32,
        patch_size=8, coordinate_size=8, shape_size=16, max_2d_position_embeddings=128, max_position_embeddings=64,
    ),
    "lxmert": from_config(
        "LxmertModel", "LxmertConfig",
        lambda: {"input_ids": tokens(), "visual_feats": floats(2, 4, 24), "visual_pos": torch.rand(2, 4, 4)}, vocab_size=100,
        hidden_size=32, num_attention_heads=2, intermediate_size=64, l_layers=1, x_layers=1, r_layers=1,
        visual_feat_dim=24,
    ),
    "metaclip_2": from_config("MetaClip2Model", _two_towers("MetaClip2Config", projection_dim=24),
                              words_and_picture),
    "mgp_str": from_config("MgpstrForSceneTextRecognition", "MgpstrConfig", lambda: image(32), image_size=[32, 32],
                           patch_size=8, max_token_length=5, num_character_labels=12, num_bpe_labels=20,
                           num_wordpiece_labels=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
    "owlvit": from_config(
        "OwlViTForObjectDetection", _two_towers("OwlViTConfig", projection_dim=32), words_and_picture
    ),
    "paligemma": from_config(
        "PaliGemmaForConditionalGeneration",
        lambda t: t.PaliGemmaConfig(
            vision_config=t.SiglipVisionConfig(**VISION_TOWER, projection_dim=32),
            text_config=t.GemmaConfig(**TEXT_TOWER, num_key_value_heads=1, head_dim=16, **PAD), image_token_index=99,
            projection_dim=32,
        ),
        lambda: {"input_ids": _with_image_tokens(16, 99), "pixel_values": picture()},
    ),
    "pix2struct": from_config(
        "Pix2StructForConditionalGeneration",
        lambda t: t.Pix2StructConfig(
            text_config={"vocab_size": 100, "hidden_size": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2,
                         "decoder_start_token_id": 0},
            vision_config={"hidden_size": 32, "patch_embed_hidden_size": 48, "d_ff": 64, "d_kv": 16,
                           "num_hidden_layers": 2, "num_attention_heads": 2, "seq_len": 32},
        ),
        lambda: {"flattened_patches": torch.cat([torch.randint(1, 8, (2, 6, 2)).float(), floats(2, 6, 48)], -1),
                 "decoder_input_ids": tokens(4)},
    ),
    "qwen2_vl": from_config(
        "Qwen2VLForConditionalGeneration",
        lambda t: t.Qwen2VLConfig(
            text_config={**TEXT_TOWER, "num_key_value_heads": 1, **PAD,
                         "rope_parameters": {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3],
                                             "rope_theta": 1e4}},
            vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8,
                           "mlp_ratio": 2, "spatial_merge_size": 2, "temporal_patch_size": 2},
            image_token_id=99, video_token_id=98, vision_start_token_id=97, vision_end_token_id=96,
        ),
        lambda: {"input_ids": _with_image_tokens(4, 99).clamp(max=99), "pixel_values": floats(32, 384),
                 "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
                 "mm_token_type_ids": (_with_image_tokens(4, 99) == 99).int()},
    ),
    "siglip": from_config("SiglipModel", _two_towers("SiglipConfig"),
                          lambda: {"input_ids": tokens(), "pixel_values": picture()}),
    "smolvlm": from_config(
        "SmolVLMForConditionalGeneration",
        lambda t: t.SmolVLMConfig(
            text_config=t.LlamaConfig(**TEXT_TOWER, num_key_value_heads=2, **PAD), vision_config=VISION_TOWER,
            image_token_id=99, scale_factor=2,
        ),
        lambda: {"input_ids": _with_image_tokens(4, 99), "pixel_values": picture()[:, None]},
    ),
    "vilt": from_config("ViltModel", "ViltConfig", words_and_picture, **VIT, vocab_size=100, max_image_length=-1,
                        max_position_embeddings=32),
    "vision_encoder_decoder": from_config(
        "VisionEncoderDecoderModel",
        lambda t: t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            t.ViTConfig(**VISION_TOWER),
            t.TrOCRConfig(vocab_size=100, d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=64,
                          cross_attention_hidden_size=32, max_position_embeddings=32),
        ),
        lambda: {"pixel_values": picture(), "decoder_input_ids": tokens(4)},
    ),
    "visual_bert": from_config(
        "VisualBertModel", "VisualBertConfig", lambda: {"input_ids": tokens(), "visual_embeds": floats(2, 4, 24)}, **TINY,
        visual_embedding_dim=24,
    ),
    "x_clip": from_config(
        "XCLIPModel",
        lambda t: t.XCLIPConfig(
            text_config=TEXT_TOWER | {"max_position_embeddings": 32},
            vision_config=VISION_TOWER | {"num_frames": 4, "mit_hidden_size": 32, "mit_intermediate_size": 64,
                                          "mit_num_attention_heads": 2, "mit_num_hidden_layers": 1},
            projection_dim=32, prompt_num_attention_heads=2,
        ),
        lambda: {"input_ids": tokens(), "pixel_values": video(), "attention_mask": torch.ones(2, 8, dtype=torch.long)},
    ),
}  # fmt: skip

# --- series and decisions ---------------------------------------------------------------------------------------------


def past() -> dict[str, torch.Tensor]:
    return {
        "past_values": floats(2, 19), "past_time_features": floats(2, 19, 1), "past_observed_mask": torch.ones(2, 19),
        "static_categorical_features": torch.zeros(2, 1, dtype=torch.long), "future_values": floats(2, 4),
        "future_time_features": floats(2, 4, 1),
    }  # fmt: skip


SERIES = {
    "prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2, 7], "num_time_features": 1,
    "num_static_categorical_features": 1, "cardinality": [4], "embedding_dimension": [2], "d_model": 32,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
}  # fmt: skip

OTHERS: dict[str, Factory] = {
    "autoformer": from_config("AutoformerModel", "AutoformerConfig", past, **SERIES, label_length=2, moving_average=5),
    "decision_transformer": from_config(
        "DecisionTransformerModel", "DecisionTransformerConfig",
        lambda: {"states": floats(2, 6, 5), "actions": floats(2, 6, 3), "rewards": floats(2, 6, 1),
                 "returns_to_go": floats(2, 6, 1), "timesteps": torch.arange(6).expand(2, 6).clone(),
                 "attention_mask": torch.ones(2, 6, dtype=torch.long)},
        state_dim=5, act_dim=3, hidden_size=32, max_ep_len=16, n_layer=2, n_head=2,
    ),
    "informer": from_config("InformerModel", "InformerConfig", past, **SERIES),
    "patchtsmixer": from_config("PatchTSMixerForPrediction", "PatchTSMixerConfig", lambda: floats(2, 32, 3),
                                context_length=32, patch_length=8, patch_stride=8, num_input_channels=3, d_model=16,
                                num_layers=2, prediction_length=4, mode="mix_channel", gated_attn=True),
    "patchtst": from_config("PatchTSTForPrediction", "PatchTSTConfig", lambda: floats(2, 32, 3), context_length=32,
                            patch_length=8, patch_stride=8, num_input_channels=3, d_model=32, num_hidden_layers=2,
                            num_attention_heads=4, ffn_dim=64, prediction_length=4),
    "time_series_transformer": from_config("TimeSeriesTransformerModel", "TimeSeriesTransformerConfig", past, **SERIES),
}  # fmt: skip

FAMILIES = {
    "decoders": DECODERS, "encoders": ENCODERS, "encoders with decoders": SEQ2SEQ, "vision": VISION,
    "detection and segmentation": DETECTION, "sound": AUDIO, "several kinds of input": MULTIMODAL,
    "series and decisions": OTHERS,
}  # fmt: skip

ZOO: dict[str, Factory] = {name: factory for family in FAMILIES.values() for name, factory in family.items()}
