"""What a user may have meant by an unknown key: names from other trainers, and close spellings."""

import difflib

from uoe_jax.config.fields import leaves, printable
from uoe_jax.config.schema import Config
from uoe_jax.errors import UserError

DECLARED = {name: meta for name, _, meta in leaves(Config())}  # every key
ALL_KEYS = tuple(DECLARED)

OPTIMIZER_NAMES = {f"optimizer.{name}" for name in ("algorithm", "kind", "name", "type")}
OPTIMIZER_NAMES |= {"optimizer", "train.optimizer"}
# Key -> its names in other trainers; `*` stands for the sections of the routed blocks.
ALIASES = {
    "data.path": "data_dir dataset_path data_path files",
    "data.source": "dataset dataset_name dataset_type corpus",
    "data.tokenizer_file": "tokenizer_path tokenizer_name vocab_file",
    "checkpoint.every": "checkpoint_every checkpoint_period save_every save_interval save_steps",
    "checkpoint.keep_latest": "keep max_to_keep save_total_limit keep_latest_k",
    "eval.batches": "eval_batches eval_iters eval_steps",
    "eval.every": "eval_every eval_freq eval_interval",
    "generate.max_tokens": "max_new_tokens n_tokens",
    "generate.temperature": "temp",
    "mesh.data": "dp data_parallel data_parallelism ici_data_parallelism"
    " data_parallel_replicate_degree",
    "mesh.expert": "ep tp tensor expert_parallel tensor_parallel ici_tensor_parallelism"
    " ici_expert_parallelism tensor_parallel_degree expert_parallel_degree",
    "mesh.fsdp": "fully_sharded ici_fsdp_parallelism shard data_parallel_shard_degree",
    "mesh.replica": "dcn dcn_data_parallelism",
    "mesh.sequence_parallel": "sp sequence",
    "model.activation": "act act_fn activation_function hidden_act mlp_activations nonlinearity",
    "model.attention_dropout": "attn_dropout attention_probs_dropout_prob",
    "model.context_length": "seq_len max_seq_len sequence_length seq_length block_size n_ctx"
    " max_length max_target_length max_position_embeddings max_seq_length context",
    "model.d_hidden": "d_ff dim_ff ffn_dim ffn_hidden_size hidden_dim intermediate_size mlp_dim",
    "model.d_model": "hidden_size dim emb_dim embed_dim embedding_dim model_dim n_embd width",
    "model.dtype": "precision compute_dtype mixed_precision param_dtype",
    "model.mlp": "ffn feed_forward",
    "model.n_heads": "heads n_head num_heads num_attention_heads num_query_heads",
    "model.n_kv_heads": "kv_heads n_kv_head num_kv_heads num_key_value_heads",
    "model.n_layers": "depth layers n_layer num_layers num_hidden_layers num_decoder_layers",
    "model.norm_eps": "layer_norm_eps rms_norm_eps normalization_layer_epsilon",
    "model.position": "pos_emb position_embedding positional_encoding",
    "model.remat": "activation_checkpoint checkpointing gradient_checkpointing remat_policy",
    "model.rope_theta": "rope_base rope_max_timescale theta",
    "model.tie_embeddings": "tie_weights tie_word_embeddings weight_tying",
    "model.vocab_size": "n_vocab vocab num_embeddings",
    "model.*.balance_weight": "aux_loss_coef aux_loss_weight load_balance_loss_weight"
    " load_balance_weight router_aux_loss_coef",
    "model.*.bias_rate": "bias_update_speed router_bias_update_rate",
    "model.*.capacity_factor": "cf capacity expert_capacity_factor",
    "model.*.k": "k top_k topk experts_per_token num_experts_per_tok num_selected_experts",
    "model.*.n_experts": "n_experts experts num_experts num_local_experts n_routed_experts",
    "model.*.router_noise": "jitter jitter_noise",
    "model.*.z_weight": "z_loss z_loss_weight router_z_loss router_z_loss_coef",
    "model.moe.d_expert": "expert_dim moe_intermediate_size",
    "model.moe.n_shared": "n_shared_experts num_shared_experts shared_experts",
    "optimizer.b1": "adam_b1 adam_beta1 beta1",
    "optimizer.b2": "adam_b2 adam_beta2 beta2",
    "optimizer.clip_norm": "clip clip_grad grad_clip gradient_clipping_threshold max_grad_norm"
    " max_norm",
    "optimizer.decay_steps": "lr_decay_iters lr_decay_steps",
    "optimizer.eps": "adam_eps adam_epsilon epsilon",
    "optimizer.final_fraction": "final_lr lr_min min_lr min_lr_ratio end_value",
    "optimizer.learning_rate": "lr base_lr max_lr peak_lr peak_learning_rate",
    "optimizer.schedule": "decay_type lr_schedule lr_scheduler lr_scheduler_type scheduler",
    "optimizer.warmup_steps": "warmup lr_warmup_steps warmup_iters num_warmup_steps",
    "optimizer.weight_decay": "wd decay adam_weight_decay",
    "train.accumulation": "grad_accum grad_accumulation accum_steps accumulate_grad_batches"
    " gradient_accumulation gradient_accumulation_steps microbatches",
    "train.batch_size": "bs batch global_batch_size local_batch_size per_device_batch_size",
    "train.init_from": "init_checkpoint load_from load_parameters_path pretrained resume_from",
    "train.log_every": "log_freq log_interval log_period logging_steps",
    "train.seed": "random_seed rng_seed",
    "train.steps": "epochs iters max_iters max_steps n_steps num_steps total_steps train_steps"
    " training_steps",
}
# What a user may call a section.
_SECTIONS = "dataset=data generation=generate sampling=generate optim=optimizer trainer=train"
_SECTIONS += " training=train attention=smha attn=smha experts=uome feed_forward=uome ffn=uome"
_SECTIONS += " mlp=uome router=uome"
_SECTION_OF = dict(name.split("=") for name in _SECTIONS.split())


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def nearest_key(name: str) -> str:
    """The known key that an unknown name most likely means.

    First comes one with this name, here or in another trainer: of several the one that shares most
    sections. Then comes a close spelling in the same section, then the closest of all keys.
    """
    *parents, last = name.split(".")
    sections = [_SECTION_OF.get(part, part) for part in parents]
    places = [place for place, names in ALIASES.items() if last.lower() in names.split()]
    known = [place.replace("*", block) for place in places for block in ("uome", "smha", "moe")]
    named = [key for key in known if key in DECLARED] + [k for k in ALL_KEYS if _last(k) == last]
    if named:
        return min(named, key=lambda k: (-len({*sections} & {*k.split(".")}), k.count(".")))
    section = ".".join(sections)
    inside = {_last(k): k for k in ALL_KEYS if k.rpartition(".")[0].endswith(section)}
    close = difflib.get_close_matches(last, inside, n=1, cutoff=0.6) if section else []
    return inside[close[0]] if close else difflib.get_close_matches(name, ALL_KEYS, 1, 0.0)[0]


def unknown_key(name: str) -> UserError:
    """The error for a key that no section has, with the nearest known key."""
    shown = f"config.{printable(name)}"
    if name in OPTIMIZER_NAMES:
        keys = ", ".join(_last(key) for key in ALL_KEYS if key.startswith("optimizer."))
        return UserError(f"{shown}: unknown key; optimizer.*: AdamW only, with the keys {keys}")
    inside = [key for key in ALL_KEYS if key.startswith(f"{name}.")]
    if inside:
        remedy = f"set a key inside it, such as config.{inside[0]}"
        return UserError(f"{shown}: this is a section; {remedy}")
    return UserError(f"{shown}: unknown key; the nearest known key is config.{nearest_key(name)}")
