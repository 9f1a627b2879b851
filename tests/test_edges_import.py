"""What users' model directories hold: keys that are not known, two sources of truth, casts that change values."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from etils import epath
from exchange_runs import CUT, LLAMA, config_of, exported, imported, run_of
from safetensors.numpy import load_file, save_file

from uoe_jax import cli
from uoe_jax.config import from_dict, to_dict
from uoe_jax.data.tokenizers.hf import HFTokenizer
from uoe_jax.errors import ConfigError, UserError
from uoe_jax.exchange.plan_import import plan
from uoe_jax.exchange.tensors import Tensor, Tensors, write
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.train.restore import check_init_from

BASE = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300, hidden_act="silu",
    rms_norm_eps=1e-5, max_position_embeddings=4096, initializer_range=0.02, torch_dtype="bfloat16", use_cache=True,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
GPT2 = dict(
    model_type="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=300, activation_function="gelu_new",
    layer_norm_epsilon=1e-5,
)  # fmt: skip
VIT = dict(
    model_type="vit", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16,
    patch_size=4, num_channels=3, hidden_act="gelu", layer_norm_eps=1e-12,
)  # fmt: skip

# Shapes of config.json as they are published, in small sizes.
PUBLISHED = {
    "llama 1": dict(BASE, model_type="llama", architectures=["LLaMAForCausalLM"], max_sequence_length=2048, bos_token_id=0, eos_token_id=1, pad_token_id=-1),
    "llama 2": dict(BASE, model_type="llama", architectures=["LlamaForCausalLM"], pretraining_tp=1, rope_scaling=None, tie_word_embeddings=False, num_key_value_heads=2, _name_or_path="x"),
    "llama 3.1": dict(BASE, model_type="llama", attention_bias=False, attention_dropout=0.0, mlp_bias=False, rope_theta=5e5, rope_scaling=LLAMA3, eos_token_id=[1, 8, 9]),
    "llama 3.2": dict(BASE, model_type="llama", head_dim=8, rope_theta=5e5, rope_scaling=LLAMA3, tie_word_embeddings=True),
    "llama of transformers 5": dict(BASE, model_type="llama", head_dim=8, dtype="bfloat16", rope_parameters=dict(LLAMA3, rope_theta=5e5)),
    "llama of both": dict(BASE, model_type="llama", rope_theta=5e5, rope_scaling=LLAMA3, rope_parameters=dict(LLAMA3, rope_theta=5e5)),
    "llama with a length on top": dict(BASE, model_type="llama", rope_scaling={k: v for k, v in LLAMA3.items() if "max" not in k}, original_max_position_embeddings=64),
    "smollm": dict(BASE, model_type="llama", is_llama_config=True, rope_interleaved=False, **{"transformers.js_config": {"dtype": "q4"}}),
    "tinyllama": dict(BASE, model_type="llama", num_key_value_heads=2, unsloth_fixed=True, rope_scaling={"type": "default", "factor": 1.0}),
    "old temperature": dict(BASE, model_type="llama", do_sample=True, temperature=0.9, top_p=0.6),
    "mistral 0.1": dict(BASE, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=4096, num_key_value_heads=2),
    "mistral 0.2": dict(BASE, model_type="mistral", num_key_value_heads=None, sliding_window=None),
    "mistral 0.3": dict(BASE, model_type="mistral", sliding_window=None, head_dim=None, num_key_value_heads=2),
    "qwen 2.5": dict(BASE, model_type="qwen2", use_sliding_window=False, sliding_window=4096, max_window_layers=28, num_key_value_heads=2, use_mrope=False),
    "qwen of transformers 5": dict(BASE, model_type="qwen2", layer_types=["full_attention"] * 2, num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "gpt2": dict(GPT2, n_ctx=64, architectures=["GPT2LMHeadModel"], attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1, summary_type="cls_index", summary_use_proj=True, summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True, task_specific_params={"text-generation": {"do_sample": True}}),
    "distilgpt2": dict(GPT2, n_special=0, predict_special_tokens=True, _num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}, n_inner=None, scale_attn_weights=True, reorder_and_upcast_attn=False, scale_attn_by_inverse_layer_idx=False),
    "gpt2, other names": {**{k: v for k, v in GPT2.items() if k != "n_embd"}, "hidden_size": 32, "max_position_embeddings": 64},
    "vit": dict(VIT, architectures=["ViTForImageClassification"], attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, qkv_bias=True, encoder_stride=16, id2label={"0": "cat", "1": "dog"}, label2id={"cat": 0, "dog": 1}, pooler_act="tanh", pooler_output_size=32),
    "vit, labels by number": dict(VIT, num_labels=7, problem_type="single_label_classification"),
    "llama 2 chat": dict(BASE, model_type="llama", architectures=["LlamaForCausalLM"], max_length=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2, pretraining_tp=1),
    "mistral instruct 0.2": dict(BASE, model_type="mistral", architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, attention_dropout=0.0, tie_word_embeddings=False, num_key_value_heads=2, rope_theta=1e6, sliding_window=None),
    "mistral nemo": dict(BASE, model_type="mistral", architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, attention_dropout=0.0, tie_word_embeddings=False, num_key_value_heads=2, head_dim=8, rope_theta=1e6, sliding_window=None, transformers_version="4.43.0.dev0"),
    "ministral": dict(BASE, model_type="mistral", architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, attention_dropout=0.0, tie_word_embeddings=False, num_key_value_heads=2, head_dim=8, rope_theta=1e8, sliding_window=32768),
    "zephyr": dict(BASE, model_type="mistral", architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, attention_dropout=0.0, tie_word_embeddings=False, num_key_value_heads=2, rope_theta=1e4, sliding_window=4096, use_cache=True, pad_token_id=2, _name_or_path="data/zephyr"),
    "mistral of two bfloat16 keys": dict(BASE, model_type="mistral", architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, attention_dropout=0.0, tie_word_embeddings=False, num_key_value_heads=2, dtype="bfloat16", sliding_window=None),
    "mistral of transformers 5": dict(BASE, model_type="mistral", architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, attention_dropout=0.0, tie_word_embeddings=False, num_key_value_heads=2, head_dim=8, dtype="bfloat16", sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "mathstral": dict(BASE, model_type="mistral", architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, attention_dropout=0.0, tie_word_embeddings=False, num_key_value_heads=2, rope_theta=1e6, sliding_window=None, head_dim=None),
    "qwen 1.5": dict(BASE, model_type="qwen2", architectures=["Qwen2ForCausalLM"], bos_token_id=1, eos_token_id=2, attention_dropout=0.0, num_key_value_heads=2, use_sliding_window=False, max_window_layers=21, sliding_window=32768, rope_theta=1e6, tie_word_embeddings=True),
    "qwen 2 72B": dict(BASE, model_type="qwen2", architectures=["Qwen2ForCausalLM"], bos_token_id=1, eos_token_id=2, attention_dropout=0.0, num_key_value_heads=2, use_sliding_window=False, max_window_layers=80, sliding_window=131072, rope_theta=1e6, tie_word_embeddings=False, rms_norm_eps=1e-6),
    "qwen 2.5 coder": dict(BASE, model_type="qwen2", architectures=["Qwen2ForCausalLM"], bos_token_id=1, eos_token_id=2, attention_dropout=0.0, num_key_value_heads=2, use_sliding_window=False, max_window_layers=28, sliding_window=131072, rope_theta=1e6, tie_word_embeddings=True, use_mrope=False),
    "qwen 2.5 math": dict(BASE, model_type="qwen2", architectures=["Qwen2ForCausalLM"], bos_token_id=1, eos_token_id=2, attention_dropout=0.0, num_key_value_heads=2, use_sliding_window=False, max_window_layers=21, sliding_window=4096, rope_theta=1e4, tie_word_embeddings=True),
    "r1 distill of qwen": dict(BASE, model_type="qwen2", architectures=["Qwen2ForCausalLM"], bos_token_id=1, eos_token_id=2, attention_dropout=0.0, num_key_value_heads=2, use_sliding_window=False, max_window_layers=21, sliding_window=4096, rope_theta=1e4, tie_word_embeddings=False, use_mrope=False),
    "qwq": dict(BASE, model_type="qwen2", architectures=["Qwen2ForCausalLM"], bos_token_id=1, eos_token_id=2, attention_dropout=0.0, num_key_value_heads=2, use_sliding_window=False, max_window_layers=64, sliding_window=32768, rope_theta=1e6, pad_token_id=3, tie_word_embeddings=False),
    "qwen without a window": dict(BASE, model_type="qwen2", architectures=["Qwen2ForCausalLM"], bos_token_id=1, eos_token_id=2, attention_dropout=0.0, num_key_value_heads=2, use_sliding_window=False, sliding_window=None, rope_theta=1e6, rope_scaling=None),
    "qwen with many ends": dict(BASE, model_type="qwen2", architectures=["Qwen2ForCausalLM"], bos_token_id=1, eos_token_id=2, attention_dropout=0.0, num_key_value_heads=2, use_sliding_window=False, rope_theta=1e6, max_window_layers=2, tie_word_embeddings=True) | {"eos_token_id": [2, 3]},
    "gpt2 medium": dict(GPT2, architectures=["GPT2LMHeadModel"], n_ctx=64, bos_token_id=299, eos_token_id=299, attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1, summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True, initializer_range=0.02, n_special=0, predict_special_tokens=True),
    "gpt2 xl": dict(GPT2, architectures=["GPT2LMHeadModel"], n_ctx=64, bos_token_id=299, eos_token_id=299, attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1, summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True, initializer_range=0.02, output_past=True, task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}),
    "dialogpt": dict(GPT2, architectures=["GPT2LMHeadModel"], n_ctx=64, bos_token_id=299, eos_token_id=299, attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1, summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True, initializer_range=0.02, transformers_version="4.27.0.dev0"),
    "gpt2 of transformers 5": dict(GPT2, architectures=["GPT2LMHeadModel"], n_ctx=64, bos_token_id=299, eos_token_id=299, attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1, summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True, initializer_range=0.02, dtype="float32", n_inner=None, scale_attn_weights=True, tie_word_embeddings=True, add_cross_attention=False),
    "cerebras": dict(GPT2, architectures=["GPT2LMHeadModel"], n_ctx=64, bos_token_id=299, eos_token_id=299, attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1, summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True, initializer_range=0.02, n_inner=128, scale_attn_weights=True, reorder_and_upcast_attn=False, scale_attn_by_inverse_layer_idx=False) | {"activation_function": "gelu"},
    "gpt2 in another language": dict(GPT2, architectures=["GPT2LMHeadModel"], n_ctx=64, bos_token_id=299, eos_token_id=299, attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1, summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True, initializer_range=0.02, gradient_checkpointing=False, tokenizer_class="T5Tokenizer", finetuning_task=None, use_cache=True),
    "gpt2, wide": dict(GPT2, architectures=["GPT2LMHeadModel"], n_ctx=64, bos_token_id=299, eos_token_id=299, attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1, summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True, initializer_range=0.02, n_inner=96),
    "vit 384": dict(VIT, architectures=["ViTForImageClassification"], attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, initializer_range=0.02, qkv_bias=True, encoder_stride=16) | {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}},
    "vit 21k": dict(VIT, architectures=["ViTForImageClassification"], attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, initializer_range=0.02, qkv_bias=True) | {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}},
    "vit tiny": dict(VIT, architectures=["ViTForImageClassification"], attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, initializer_range=0.02, qkv_bias=True, torch_dtype="float32", transformers_version="4.19.0.dev0") | {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}},
    "deit as vit": dict(VIT, architectures=["ViTForImageClassification"], attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, initializer_range=0.02, problem_type=None) | {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}},
    "vit of transformers 5": dict(VIT, architectures=["ViTForImageClassification"], attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, initializer_range=0.02, dtype="float32", pooler_act="tanh", pooler_output_size=32, encoder_stride=16, qkv_bias=True) | {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}},
    "vit food": dict(VIT, architectures=["ViTForImageClassification"], attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, initializer_range=0.02, qkv_bias=True, problem_type="single_label_classification", finetuning_task="image-classification", num_labels=2),
    "vit huge": dict(VIT, architectures=["ViTForImageClassification"], attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, initializer_range=0.02) | dict(hidden_size=64, intermediate_size=256, qkv_bias=True) | {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}},
    "vit of old eps": dict(VIT, architectures=["ViTForImageClassification"], attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, initializer_range=0.02, gradient_checkpointing=False, qkv_bias=True) | {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}} | {"layer_norm_eps": 1e-6},
}  # fmt: skip
# Keys that published models of these or neighbouring families have, each with a value that changes what is computed.
UNKNOWN = dict(
    attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=256, logit_scale=0.0625,
    embedding_multiplier=12.0, residual_multiplier=0.22, use_qk_norm=True, num_local_experts=8, is_causal=False,
    partial_rotary_factor=0.5, rope_interleaved=True, parallel_residual=True, scale_embedding=True, add_cross_attention=True,
    use_bidirectional_attention=True, quantization_config={"quant_method": "awq"}, auto_map={"AutoModel": "m.Model"},
    pruned_heads={"0": [1]}, is_encoder_decoder=True, attention_sink_size=4, some_new_switch=False, layer_norm=[],
)  # fmt: skip


def planned(place, values, **overrides):
    (place / "config.json").write_text(json.dumps(values))
    return plan(str(place), None, dict(n_experts="2", k="1"), overrides, str(place / "run"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_come_in_and_none_with_a_key_that_is_not_known(name, tmp_path):
    planned(tmp_path, PUBLISHED[name])
    for key, value in UNKNOWN.items():
        with pytest.raises(UserError, match=rf"config.json has {key}=") as caught:
            planned(tmp_path, PUBLISHED[name] | {key: value})
        assert "\n" not in str(caught.value)
    planned(tmp_path, PUBLISHED[name] | {"some_new_switch": None})


ROPE5 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0
)
WRONG = {
    "a size as text": (dict(hidden_size="32"), "hidden_size='32'; give a whole number"),
    "a size that is true": (dict(num_hidden_layers=True), "num_hidden_layers=True; give a whole number"),
    "no heads": (dict(num_attention_heads=0), "num_attention_heads=0; give a whole number of at least 1"),
    "a list": (dict(vocab_size=[300]), r"vocab_size=\[300\]; give a whole number"),
    "an activation that is none": (dict(hidden_act=["silu"]), "hidden_act="),
    "an epsilon as text": (dict(rms_norm_eps="1e-5"), "rms_norm_eps='1e-5'; give a number"),
    "tied by text": (dict(tie_word_embeddings="true"), "tie_word_embeddings='true'; give true or false"),
    "scaling by name": (dict(rope_scaling="linear"), "rope_scaling='linear'; give an object"),
    "scaling of another kind": (dict(rope_scaling={"type": "linear", "factor": 2.0}), "type='linear', for which there is no block"),
    "scaling without length": (dict(rope_scaling=ROPE5), "no original_max_position_embeddings"),
    "scaling without a factor": (dict(rope_parameters={"rope_type": "llama3", "original_max_position_embeddings": 8}), "has no factor"),
    "a factor as text": (dict(rope_scaling=dict(LLAMA3, factor="8")), "factor='8'; give a number"),
    "a new key of scaling": (dict(rope_scaling=dict(LLAMA3, mscale=0.7)), "mscale=0.7"),
    "two thetas": (dict(rope_theta=1e4, rope_parameters={"rope_theta": 5e5}), "rope_theta=500000.0, and config.json itself"),
    "two scalings": (dict(rope_scaling=LLAMA3, rope_parameters={"rope_type": "default"}), "rope_parameters and rope_scaling that differ"),
    "a kind that is a list": (dict(rope_scaling={"rope_type": ["llama3"]}), "rope_type="),
    "two lengths": (dict(rope_scaling=LLAMA3, original_max_position_embeddings=128), "original_max_position_embeddings=64.0, and"),
    "half a token": (dict(rope_scaling=dict(LLAMA3, original_max_position_embeddings=64.5)), "64.5; give a whole number"),
    "two kinds": (dict(rope_scaling=dict(LLAMA3, type="default")), "make them one"),
    "layers with windows": (dict(layer_types=["sliding_attention", "full_attention"]), "layer_types="),
    "another class": (dict(architectures=["LlamaForSequenceClassification"]), "architectures="),
    "a family that is none": (dict(model_type=["llama"]), "model_type="),
    "theta below nothing": (dict(rope_theta=-1.0), "rope_theta=-1.0; give a number above 0"),
    "scores that are not scaled": (dict(GPT2, scale_attn_weights=None, hidden_size=None, num_hidden_layers=None, num_attention_heads=None, max_position_embeddings=None), "scale_attn_weights=None"),
    "a window in llama": (dict(sliding_window=512), "sliding_window=512"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_keys_of_the_wrong_kind_are_a_sentence(name, tmp_path):
    changes, said = WRONG[name]
    with pytest.raises(UserError, match=said) as caught:
        planned(tmp_path, PUBLISHED["llama 2"] | changes)
    assert "\n" not in str(caught.value)


def test_a_window_that_config_json_leaves_to_its_class(tmp_path):
    values = dict(BASE, model_type="mistral", num_key_value_heads=2, max_position_embeddings=32768)
    with pytest.raises(UserError, match="context_length=8192: the model has 4096"):
        planned(tmp_path, values, **{"model.context_length": "8192"})


def test_sections_of_the_weights_cannot_be_overridden(tmp_path):
    with pytest.raises(
        UserError, match="classifier.pooling='mean': the weights are of a model with 'cls'"
    ):
        planned(tmp_path, VIT, **{"model.classifier.pooling": "mean"})


def test_two_names_of_one_key_that_differ(tmp_path):
    with pytest.raises(UserError, match="n_positions=64 and n_ctx=128; make them one"):
        planned(tmp_path, dict(GPT2, n_ctx=128))


def test_a_key_that_stands_twice(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(PUBLISHED["llama 2"])[:-1] + ', "vocab_size": 400}'
    )
    with pytest.raises(
        UserError, match="config.json: cannot be read .the key 'vocab_size' stands there twice"
    ):
        plan(str(tmp_path), None, dict(n_experts="2", k="1"), {}, str(tmp_path / "run"))


PIXELS = {  # preprocessor_config.json: the bound that scales pixels as it does, or what is said
    "usual": (dict(image_mean=[0.5] * 3, image_std=[0.25] * 3), 2.0),
    "a number for all channels": (dict(image_mean=0.5, image_std=0.5), 1.0),
    "no normalisation": (dict(do_normalize=False), "image_mean="),
    "no normalisation, but the same": (dict(do_rescale=False, image_mean=[127.5] * 3, image_std=[127.5] * 3), 1.0),
    "another scale": (dict(rescale_factor=1 / 127.5), "image_mean="),
    "another scale, around 0": (dict(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3), 1.0),
    "not rescaled": (dict(do_rescale=False), "image_mean="),
    "channels that differ": (dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]), "image_mean="),
    "two channels": (dict(image_mean=[0.5] * 2), "num_channels=3"),
    "a mean as text": (dict(image_mean="0.5"), "image_mean='0.5'"),
    "no deviation": (dict(image_std=0), "image_std=0"),
    "flipped channels": (dict(do_flip_channel_order=True), "do_flip_channel_order=True"),
    "a flag as text": (dict(do_normalize="false"), "do_normalize='false'; give true or false"),
    "another size": (dict(size={"height": 32, "width": 32}), "image_size=16"),
    "sizes as lists": (dict(size=[16, 16]), 1.0),
    "sizes that are none": (dict(size={"height": [16], "width": 16}), "image_size=16"),
    "cropped": (dict(size={"shortest_edge": 20}, do_center_crop=True, crop_size=16), 1.0),
    "an unknown class": (dict(image_processor_type="CLIPImageProcessor"), "image_processor_type='CLIPImageProcessor'"),
}  # fmt: skip


@pytest.mark.parametrize("name", PIXELS)
def test_pixels_are_scaled_as_said_or_refused(name, tmp_path):
    values, wanted = PIXELS[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=wanted):
            planned(tmp_path, VIT)
    else:
        assert planned(tmp_path, VIT).config.model.image.bound == wanted


def test_settings_of_generation_are_named_and_unknown_ones_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text(
        json.dumps(dict(temperature=0.6, do_sample=True, top_p=1.0, eos_token_id=2))
    )
    notes = planned(tmp_path, PUBLISHED["old temperature"]).notes
    assert [note.split(" for generation")[0] for note in notes] == [
        "config.json has do_sample=True, temperature=0.9, top_p=0.6",
        "generation_config.json has do_sample=True, temperature=0.6",
    ]
    (tmp_path / "generation_config.json").write_text('{"mirror_scaling": 2}')
    with pytest.raises(UserError, match="generation_config.json has mirror_scaling=2"):
        planned(tmp_path, PUBLISHED["llama 2"])


# --- two sources of truth -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A small Llama with tied embeddings, exported; its run has a checkpoint of step 1 with weights of 1e5."""
    place, config = (
        tmp_path_factory.mktemp("tied"),
        config_of(**LLAMA | dict(n_layers=1, tie_embeddings=True)),
    )
    params = run_of(config, place / "run")
    assert exported(place / "run", place / "hf") == 0
    with CheckpointStore(place / "run") as store:
        store.save(
            1,
            {
                "params": jax.tree.map(
                    lambda a: jax.device_put(np.full(a.shape, 1e5, a.dtype)), params
                )
            },
        )
    return place / "hf"


def _inv_freq(theta: float) -> np.ndarray:
    return (theta ** -(np.arange(0, 8, 2) / 8)).astype(np.float16)


BESIDE = {  # tensors beside the weights: taken, or what is said
    "the same head": (lambda w: {"lm_head.weight": w["model.embed_tokens.weight"]}, None),
    "another head": (lambda w: {"lm_head.weight": 2 * w["model.embed_tokens.weight"]}, "lm_head.weight differs from model.embed_tokens.weight"),
    "frequencies": (lambda w: {"model.layers.0.self_attn.rotary_emb.inv_freq": _inv_freq(1e4)}, None),
    "other frequencies": (lambda w: {"model.layers.0.self_attn.rotary_emb.inv_freq": _inv_freq(5e5)}, "rotary_emb.inv_freq differs from the one"),
    "numbers that are none": (lambda w: {"model.norm.weight": w["model.norm.weight"] * np.nan}, "numbers in model.norm.weight that are not finite"),
    "whole numbers": (lambda w: {"model.norm.weight": w["model.norm.weight"].astype(np.int8)}, "model.norm.weight as I8"),
    "numbers too large": (lambda w: {"model.norm.weight": w["model.norm.weight"].astype(np.float64) * 1e300}, "which float32 cannot hold"),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_a_tensor_beside_the_weights_is_a_copy_or_refused(name, tied, tmp_path, capsys):
    change, said = BESIDE[name]
    held = load_file(tied / "model.safetensors")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text((tied / "config.json").read_text())
    save_file(held | change(held), tmp_path / "hf" / "model.safetensors")
    code = imported(tmp_path / "hf", tmp_path / "run")
    err = capsys.readouterr().err
    assert (code, said is None or said in err) == (0 if said is None else 2, True), err
    assert (tmp_path / "run").exists() == (said is None)


def _tensors(place, names, value=1.0, **options):
    write(
        epath.Path(place),
        [Tensor(name, (4,), lambda: np.full(4, value, np.float32)) for name in names],
        **options,
    )


def test_files_of_weights_that_the_index_does_not_name(tmp_path):
    _tensors(tmp_path, "abc", shard_bytes=16)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for bad in ({}, {"a": 1}, {"a": None}, {"a": "../model.safetensors"}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": bad}))
        with pytest.raises(
            UserError, match="model.safetensors.index.json (has no weight_map|says that a is in)"
        ):
            Tensors(epath.Path(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Tensors(epath.Path(tmp_path)).passed_over == [
        "consolidated.safetensors",
        "pytorch_model.bin",
    ]
    second = tmp_path / "model-00002-of-00003.safetensors"
    for extra, said in (
        (
            {"z": np.ones(4, np.float32)},
            "holds z, which model.safetensors.index.json does not name",
        ),
        ({"a": np.zeros(4, np.float32)}, "holds another a than model-00001-of-00003.safetensors"),
    ):
        save_file({"b": np.ones(4, np.float32), **extra}, second)
        with pytest.raises(UserError, match=said):
            Tensors(epath.Path(tmp_path))
    save_file({"b": np.ones(4, np.float32), "a": np.ones(4, np.float32)}, second)
    Tensors(epath.Path(tmp_path))  # a copy
    for stale in ("model.safetensors", "adapter_model.safetensors"):
        save_file({"a": np.zeros(4, np.float32)}, tmp_path / stale)
        with pytest.raises(
            UserError, match=f"holds {stale} beside model-00001-of-00003.safetensors"
        ):
            Tensors(epath.Path(tmp_path))
        (tmp_path / stale).unlink()


def test_two_files_that_scale_pixels_differently(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": {"image_std": [0.25] * 3}})
    )
    with pytest.raises(
        UserError,
        match="preprocessor_config.json and processor_config.json scale pixels differently",
    ):
        planned(tmp_path, VIT)
    (tmp_path / "preprocessor_config.json").unlink()
    assert planned(tmp_path, VIT).config.model.image.bound == 2.0


def test_two_files_that_differ_about_the_space_in_front(tmp_path):
    (tmp_path / "tokenizer.json").write_text(HFTokenizer.train([b"abc abc"] * 9, 270).to_json())
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": false}')
    planned(tmp_path, PUBLISHED["llama 2"])
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    with pytest.raises(
        UserError, match="tokenizer_config.json has add_prefix_space=True and tokenizer.json False"
    ):
        planned(tmp_path, PUBLISHED["llama 2"])


def test_two_vocabularies_that_give_a_token_two_ids(tmp_path):
    bpe = HFTokenizer.train([b"abc abc"] * 9, 270)
    (tmp_path / "tokenizer.json").write_text(bpe.to_json())
    vocabulary = json.loads(bpe.to_json())["model"]["vocab"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    assert planned(tmp_path, PUBLISHED["llama 2"]).tokenizer.vocab_size == bpe.vocab_size
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | {"a": 299}))
    with pytest.raises(
        UserError, match="tokenizer.json gives 'a' the id .* and vocab.json 299; remove one"
    ):
        planned(tmp_path, PUBLISHED["llama 2"])


# --- casts, and runs to initialise from-------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, kind", [(1e5, "float16"), (1e-9, "float16"), (-7e4, "float16"), (3.4e38, "bfloat16")]
)
def test_a_weight_that_overflows_or_underflows_is_named(value, kind, tmp_path):
    tensors = [Tensor("norm.scale", (2,), lambda: np.array([1.0, value], np.float32))]
    with pytest.raises(
        UserError,
        match=f"--dtype={kind}: norm.scale holds {value:.6g}, which becomes".replace("+", r"\+"),
    ):
        write(epath.Path(tmp_path), tensors, kind)
    assert write(epath.Path(tmp_path), tensors, kind, lossy=True) == 1
    assert write(epath.Path(tmp_path), tensors, "float32") == 0


def test_an_export_that_loses_numbers_is_refused_and_leaves_nothing(tied, tmp_path, capsys):
    out = [
        "export",
        f"--workdir={tied.parent}/run",
        "--format=safetensors",
        f"--out={tmp_path}/out",
        "--dtype=float16",
    ]
    assert cli.main([*out, "--step=1"]) == 2
    assert "which becomes inf" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert cli.main([*out, "--step=1", "--lossy"]) == 0
    assert "numbers became infinity or 0 in float16" in capsys.readouterr().err


def test_a_run_with_another_tokenizer_does_not_initialise(tmp_path):
    config = config_of(**LLAMA | dict(n_layers=1))
    before = to_dict(config) | {
        "model": to_dict(config.model) | {"norm_eps": 1e-5, "remat": "none"}
    }
    with CheckpointStore(tmp_path / "run") as store:
        store.save(
            3,
            {"params": {"w": jax.numpy.zeros(3)}},
            metadata={"config": before, "data": {"tokenizer": "bytes-257-1"}},
        )
    said: list[str] = []
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "3"):
        config = from_dict(to_dict(config) | {"train": {"init_from": str(place)}})
        check_init_from(config, "bytes-257-1", said.append)
        assert said.pop().endswith("config.model.norm_eps is 1e-05 there, 1e-06 here") and not said
        with pytest.raises(
            ConfigError,
            match="init_from='.*': its tokenizer is bytes-257-1, this run's is words-9; .*init_from_any=true",
        ):
            check_init_from(config, "words-9", said.append)
        check_init_from(
            from_dict(
                to_dict(config) | {"train": {"init_from": str(place), "init_from_any": True}}
            ),
            "words-9",
            said.append,
        )
        assert len(said) == 2 and "its tokenizer is bytes-257-1" in said[0]
        said.clear()
    bpe = HFTokenizer.train([b"abc abc"] * 9, 270)  # as an imported model has it: no record of data
    with CheckpointStore(tmp_path / "imported") as store:
        store.save(
            0,
            {"params": {"w": jax.numpy.zeros(3)}},
            metadata={"config": {"data": {"tokenizer": "bpe"}}},
        )
    (tmp_path / "imported" / "tokenizer.json").write_text(bpe.to_json())
    config = from_dict({"train": {"init_from": str(tmp_path / "imported")}})
    check_init_from(config, bpe.fingerprint, said.append)
    with pytest.raises(ConfigError, match=f"its tokenizer is {bpe.fingerprint}"):
        check_init_from(config, "bytes-257-1", said.append)
    (tmp_path / "imported" / "tokenizer.json").unlink()
    check_init_from(config, "bytes-257-1", said.append)
    assert "its tokenizer is unknown" in said[0]


def test_an_import_is_refused_with_one_sentence_and_leaves_nothing(tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(
        json.dumps(PUBLISHED["llama 2"] | {"logit_scale": 0.5})
    )
    assert cli.main(["import", f"--from={tmp_path}/hf", f"--workdir={tmp_path}/run", *CUT]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "config.json has logit_scale=0.5, which may change" in err
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
