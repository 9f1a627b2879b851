"""What values each config key takes, as the fuzz tests draw them."""

from __future__ import annotations

HUGE = 2**31 - 1

# NAME=LOW.. or LOW..HIGH: whole numbers; with a decimal point: numbers; `>`: LOW itself is out; a|b: choices; numbers: several
# ascending ones.
ROUTED = """
    n_experts=1.. k=1.. capacity_factor=>0.0..1e6 capacity_window=1.. sequence_capacity_factor=0.0..1e6 sequence_group=1..
    patch_size=1.. unit=patch|sequence|hierarchical priority=position|score router_noise=0.0..1e3 balance_weight=0.0..1e3
    gate=sigmoid|normalized|score|straight_through|none order=gather|project router_bias=bool bias_rate=0.0..1
    z_weight=0.0..1e3 dispatch=auto|inverse|scatter|onehot"""

RULES = {
    "model": """
        task=language|classify stem=tokens|image vocab_size=0.. d_model=1.. n_layers=1.. n_heads=1.. n_kv_heads=0.. d_hidden=1..
        context_length=1.. causal=bool activation=gelu|gelu_tanh|relu|swiglu|geglu
        norm=rmsnorm|layernorm norm_eps=>0.0..1 qk_norm=bool position=rope|learned|none rope_theta=1.0..1e12 rope_scaling=text bias=bool qkv_bias=bool
        tie_embeddings=bool dropout=0.0..0.99 attention_dropout=0.0..0.99 dtype=float32|bfloat16|float16
        attention=smha|dense|mla|moh|mosa|linformer|nystromformer|performer|reformer|long_short
        mlp=uome|dense|token_choice|expert_choice|deepseek_moe|xmoe|skywork_moe
        remat=none|slots|dots|block cutoffs=numbers cutoff_div=1..""",
    "model.smha": ROUTED,
    "model.uome": ROUTED,
    "model.moe": """
        n_experts=1.. k=1.. n_shared=0.. d_expert=0.. capacity_factor=>0.0..1e6 capacity_window=1.. score=softmax|sigmoid scale=>0.0..1e3
        threshold=>0.0..1 logit_scale=>0.0..1e3 balance_weight=0.0..1e3 adaptive_rate=0.0..1e3 adaptive_decay=0.0..1 adaptive_most=0.0..1e3
        bias_rate=0.0..1 z_weight=0.0..1e3""",
    "model.mla": "q_rank=0.. kv_rank=1.. d_rope=0..",
    "model.mosa": "capacity_factor=>0.0..1",
    "model.moh": "n_shared=0.. k=1.. balance_weight=0.0..1e3",
    "model.linformer": "rank=1..",
    "model.nystromformer": "landmarks=1.. iterations=1..100 kernel=0..",
    "model.performer": "features=1..",
    "model.reformer": "n_hashes=1.. chunk=1..",
    "model.long_short": "window=2.. rank=1..",
    "model.classifier": "n_classes=2.. pooling=mean|cls n_inputs=1..2 d_head=0..",
    "model.image": "height=1.. width=1.. channels=1.. patch=1.. bound=>0.0..1e3",
    "data": """
        source=stdlib|text|wikitext103|tfds_text|listops|imdb|aan|pathfinder|digits|cifar10|cifar100|imagenet2012 path=text name=text
        tokenizer=bytes|bpe|words|library tokenizer_file=text separator=text start=text min_count=1.. buckets=1.. sort_window=1.. held_out=1..40""",
    "data.listops": "min_length=1.. max_length=1.. max_depth=1..100 max_args=2..100 n_train=1.. n_eval=1.. seed=0..",
    "data.pathfinder": "size=16..512 length=2..30 distractors=0..100 n_train=1.. n_eval=1.. seed=0..",
    "augment": """
        crop_padding=0..512 crop_area=>0.0..1 flip=bool rand_layers=0..16 rand_magnitude=0..30 mixup=0.0..100 cutmix=0.0..100""",
    "optimizer": """
        schedule=cosine|linear learning_rate=>0.0..1e3 warmup_steps=0.. decay_steps=0.. final_fraction=0.0..1 weight_decay=0.0..1e3 b1=0.0..0.999999
        b2=0.0..0.999999 eps=>0.0..1 clip_norm=0.0..1e9 moment_dtype=float32|bfloat16""",
    "train": "steps=1.. batch_size=1.. accumulation=1.. seed=0.. log_every=1.. stop_after=0.. init_from=text init_from_any=bool deterministic=bool report=bool label_smoothing=0.0..0.99",
    "eval": "every=0.. batches=0.. batch_size=0.. test=bool",
    "checkpoint": "every=0.. keep_latest=1.. keep_best=0..",
    "mesh": "replica=-1.. data=-1.. fsdp=-1.. expert=-1.. sequence_parallel=bool",
    "guard": """
        spike_sigmas=0.0..1e6 max_bad_steps=1.. rollbacks=0..1000 peer_timeout_s=1.0..1e5 hang_timeout_s=0.0..1e6
        compile_timeout_s=0.0..1e6""",
    "generate": "prompt=text max_tokens=1.. temperature=0.0..1e3 top_k=0.. top_p=>0.0..1 seed=0..",
}

TABLE = {
    f"{s}.{name}": rule
    for s, text in RULES.items()
    for name, rule in (word.split("=", 1) for word in text.split())
}
