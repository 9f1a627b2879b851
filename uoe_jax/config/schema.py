"""The sections of the configuration: frozen dataclasses with one declaration per key.

From a declaration (`key`) come the `ConfigDict` that a config file edits, the checks, the error
messages, `uoe config` and the list of keys that may change when a run is resumed.
"""

import dataclasses
import math

from uoe_jax.config import baselines
from uoe_jax.config.baselines import ATTENTIONS, MLPS, UNIONS
from uoe_jax.config.data import AugmentConfig, DataConfig
from uoe_jax.config.fields import free_key, key
from uoe_jax.config.routing import RoutingConfig

TASKS = ("language", "classify")
GATED_ACTIVATIONS = ("swiglu", "geglu")  # with two projections into the hidden layer
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", *GATED_ACTIVATIONS)
DTYPES = ("float32", "bfloat16", "float16")
REMAT = ("none", "slots", "dots", "block")
MESH_AXES = ("replica", "data", "fsdp", "expert")  # outermost first


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Head of a classifier (model.task='classify')."""

    n_classes: int = key(2, "number of classes", low=2)
    pooling: str = key(
        "mean", "mean of the valid tokens, or a learned token in front", choices=("mean", "cls")
    )
    n_inputs: int = key(1, "inputs per example; two are encoded alike and compared", low=1, high=2)
    d_head: int = key(0, "hidden width of the head; 0: one linear layer", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Images as tokens (model.stem='image'), one token per patch x patch pixels, row by row."""

    height: int = key(32, "image height in pixels", low=1)
    width: int = key(32, "image width in pixels", low=1)
    channels: int = key(3, "channels per pixel", low=1)
    patch: int = key(4, "side of a patch in pixels; 1: every pixel is a token", low=1)
    bound: float = key(2.0, "pixels are scaled to -bound..bound", above=0, high=1e3)

    @property
    def values(self) -> int:
        """Numbers per token: patch * patch * channels."""
        return self.patch**2 * self.channels

    @property
    def n_tokens(self) -> int:
        return (self.height // self.patch) * (self.width // self.patch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture (D d_model, F d_hidden, H n_heads, L context_length, V vocab_size)."""

    task: str = key("language", "predict the next token, or classify the input", choices=TASKS)
    stem: str = key("tokens", "input: token ids, or images", choices=("tokens", "image"))
    vocab_size: int = key(0, "V, vocabulary size; 0: that of the tokenizer", low=0)
    d_model: int = key(192, "D, width of the residual stream", low=1)
    n_layers: int = key(4, "layers, each with an attention and an MLP block", low=1)
    n_heads: int = key(8, "H, attention heads", low=1)
    n_kv_heads: int = key(0, "key/value heads (GQA); 0: n_heads", low=0)
    d_hidden: int = key(768, "F, hidden width of the whole MLP", low=1)
    context_length: int = key(256, "L, tokens per row", low=1)
    causal: bool = key(True, "causal attention mask, as a language model needs it")
    attention: str = key("smha", "attention block", choices=("smha", "dense", *ATTENTIONS))
    mlp: str = key("uome", "MLP block", choices=("uome", "dense", *MLPS))
    activation: str = key("gelu", "activation of the MLP", choices=ACTIVATIONS)
    norm: str = key("rmsnorm", "norm before each block", choices=("rmsnorm", "layernorm"))
    norm_eps: float = key(1e-6, "epsilon added to the variance in a norm", above=0, high=1)
    qk_norm: bool = key(False, "RMSNorm of queries and keys, with one scale for all heads")
    position: str = key("rope", "position encoding", choices=("rope", "learned", "none"))
    rope_theta: float = key(10000.0, "base of the rotary frequencies", low=1, high=1e12)
    rope_scaling: str = key(
        "", "Llama 3.1 scaling of RoPE as 'factor,low,high,length', such as '8,1,4,8192'"
    )
    bias: bool = key(False, "biases in all projections")
    qkv_bias: bool = key(False, "biases of queries, keys and values only, as in Qwen2")
    tie_embeddings: bool = key(True, "share the weights of embedding and output head")
    cutoffs: str = key("", "cutoffs of the adaptive softmax, such as '20000,40000'; empty: none")
    cutoff_div: int = key(1, "factor by which each further adaptive cluster is narrower", low=1)
    dropout: float = key(0.0, "dropout rate of every block's output", low=0, high=0.99)
    attention_dropout: float = key(0.0, "dropout rate of attention weights", low=0, high=0.99)
    dtype: str = key("float32", "compute dtype; parameters are float32", choices=DTYPES)
    # Under fsdp, "none" also keeps the gathered weights for the backward pass.
    remat: str = free_key(
        "slots",
        "remat policy: recompute nothing, slots and scores, all but matmuls, or whole layers",
        choices=REMAT,
    )
    smha: RoutingConfig = RoutingConfig()
    uome: RoutingConfig = RoutingConfig()
    moe: baselines.MoEConfig = baselines.MoEConfig()
    mla: baselines.MLAConfig = baselines.MLAConfig()
    mosa: baselines.MoSAConfig = baselines.MoSAConfig()
    moh: baselines.MoHConfig = baselines.MoHConfig()
    linformer: baselines.LinformerConfig = baselines.LinformerConfig()
    nystromformer: baselines.NystromformerConfig = baselines.NystromformerConfig()
    performer: baselines.PerformerConfig = baselines.PerformerConfig()
    reformer: baselines.ReformerConfig = baselines.ReformerConfig()
    long_short: baselines.LongShortConfig = baselines.LongShortConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    image: ImageConfig = ImageConfig()

    @property
    def cutoff_list(self) -> tuple[int, ...]:
        """Vocabulary ids at which the adaptive softmax is cut; empty for a plain softmax."""
        return tuple(int(n) for n in self.cutoffs.split(",")) if self.cutoffs else ()

    @property
    def vocabulary_pieces(self) -> tuple[tuple[int, int], ...]:
        """(vocabulary entries, embedding width) of every cluster of the adaptive softmax."""
        edges, div = (0, *self.cutoff_list, self.vocab_size), self.cutoff_div
        sizes = (end - start for start, end in zip(edges, edges[1:]))
        return tuple((size, self.d_model // div**i) for i, size in enumerate(sizes))

    @property
    def rope_stretch(self) -> tuple[float, float, float, float] | None:
        """(factor, low, high, length) of `rope_scaling`."""
        if not self.rope_scaling:
            return None
        factor, low, high, length = (float(part) for part in self.rope_scaling.split(","))
        return factor, low, high, length

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def rows_per_example(self) -> int:
        return self.classifier.n_inputs if self.task == "classify" else 1

    @property
    def d_pooled(self) -> int:
        """Input width of the classifier head: one pooled state, or the comparison of two."""
        return self.d_model * (1 if self.classifier.n_inputs == 1 else 4)

    @property
    def n_into(self) -> int:
        """Projections into the hidden layer of the MLP."""
        return 2 if self.activation in GATED_ACTIVATIONS else 1

    @property
    def block_length(self) -> int:
        """Tokens per row inside the blocks: the context, and the classifier's own token if any."""
        return self.context_length + (self.task == "classify" and self.classifier.pooling == "cls")

    @property
    def out_scale(self) -> float:
        """Initial scale of the blocks' output projections; small, so that embeddings dominate."""
        return 0.3 * (2 * self.n_layers) ** -0.5

    @property
    def rotary_dim(self) -> int:
        """Rotary width of a head."""
        width = self.head_dim
        return (self.mla.d_rope or width // 2) if self.attention == "mla" else width

    @property
    def d_expert(self) -> int:
        """Hidden width of one expert of a mixture of experts (model.moe)."""
        return self.moe.d_expert or self.d_hidden // (self.moe.k + self.moe.n_shared)

    @property
    def routed_hidden(self) -> int:
        """Hidden units of all routed experts of the MLP block."""
        if self.mlp in MLPS:
            return self.moe.n_experts * self.d_expert
        return self.d_hidden if self.mlp == "uome" else 0

    @property
    def whole_hidden(self) -> int:
        """Hidden units that take every token: of a dense MLP, or of shared experts."""
        if self.mlp in MLPS:
            return self.moe.n_shared * self.d_expert
        return self.d_hidden if self.mlp == "dense" else 0

    def routed(self) -> dict[str, RoutingConfig]:
        """The routing of every block that routes, by the name of the block."""
        out: dict[str, RoutingConfig] = {}
        if self.attention in ("mosa", "moh"):
            out[self.attention] = getattr(self, self.attention).routing(self.n_heads)
        out |= self.unions()
        if self.mlp in MLPS:
            out[self.mlp] = self.moe.routing(self.mlp)
        return out

    def place_of(self, name: str) -> str:
        """Where a block of this name stands in a layer: "attention" or "mlp"."""
        return "attention" if name == self.attention else "mlp"

    def unions(self) -> dict[str, RoutingConfig]:
        """Those of `routed` that are unions of experts."""
        return {name: getattr(self, name) for name in (self.attention, self.mlp) if name in UNIONS}

    @property
    def patch_multiple(self) -> int:
        """Documents are padded to a multiple of this, so that no patch spans two documents."""
        return math.lcm(*(r.patch_size for r in self.routed().values()), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warmup and decay of the learning rate."""

    learning_rate: float = key(1e-3, "peak learning rate", above=0, high=1e3)
    warmup_steps: int = key(100, "steps of linear warmup", low=0)
    schedule: str = key("cosine", "decay after the warmup", choices=("cosine", "linear"))
    decay_steps: int = key(0, "step at which the decay ends; 0: train.steps", low=0)
    final_fraction: float = key(0.1, "final learning rate relative to the peak", low=0, high=1)
    weight_decay: float = key(0.1, "decoupled weight decay of matrices", low=0, high=1e3)
    b1: float = key(0.9, "decay rate of Adam's first moment", low=0, high=0.999999)
    b2: float = key(0.95, "decay rate of Adam's second moment", low=0, high=0.999999)
    eps: float = key(1e-8, "Adam's epsilon", above=0, high=1)
    clip_norm: float = key(1.0, "clip the global gradient norm to this; 0: off", low=0, high=1e9)
    moment_dtype: str = key("float32", "storage dtype of Adam's moments", choices=DTYPES[:2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, seed and start of a training run."""

    steps: int = key(1000, "optimizer steps of the whole run", low=1)
    batch_size: int = key(16, "global rows per step", low=1)
    accumulation: int = key(1, "gradient accumulation: microbatches per step", low=1)
    seed: int = key(0, "seed of initialisation and data order", low=0)
    log_every: int = free_key(10, "steps between logged metrics", low=1)
    stop_after: int = free_key(0, "step at which to stop early; 0: train.steps", low=0)
    report: bool = free_key(True, "write report.html into the workdir at the end")
    label_smoothing: float = key(0.0, "label smoothing of a classifier", low=0, high=0.99)
    init_from: str = key("", "workdir or checkpoint whose matching parameters to start from")
    init_from_any: bool = free_key(False, "allow init_from a run with another tokenizer")
    deterministic: bool = free_key(False, "bit-identical runs on GPUs too; may be slower")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation during training."""

    every: int = free_key(200, "steps between evaluations; 0: only at the end", low=0)
    batches: int = free_key(
        0, "batches per evaluation; 0: the whole split, as always at the end", low=0
    )
    test: bool = free_key(False, "at the end, evaluate the best checkpoint on the test split")
    batch_size: int = free_key(0, "global rows per batch; 0: train.batch_size", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often checkpoints are saved, and how many are kept."""

    every: int = free_key(200, "steps between checkpoints; 0: only at the end", low=0)
    keep_latest: int = free_key(2, "latest checkpoints to keep", low=1)
    keep_best: int = free_key(
        1, "best checkpoints to keep, by validation loss or error rate", low=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Reaction to bad numbers, and to processes that are lost or hang."""

    # Above the running mean. A loss that rises for good is a spike at every step.
    spike_sigmas: float = key(
        0.0, "skip steps whose loss or gradient is so many sigmas high; 0: off", low=0, high=1e6
    )
    max_bad_steps: int = free_key(
        5, "skipped steps in a row before the run stops or rolls back", low=1
    )
    rollbacks: int = free_key(
        0, "times that a run rolls back instead of stopping", low=0, high=1000
    )
    peer_timeout_s: float = free_key(
        10.0, "seconds until all processes stop after one is lost", low=1, high=1e5
    )
    hang_timeout_s: float = free_key(
        300.0, "seconds without progress until processes stop; 0: off", low=0, high=1e6
    )
    compile_timeout_s: float = free_key(
        1800.0, "the same while compiling, reading or writing", low=0, high=1e6
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one is -1 and takes the remaining devices."""

    replica: int = free_key(1, "data parallelism across slow networks", low=-1)
    data: int = free_key(-1, "data parallelism", low=-1)
    fsdp: int = free_key(1, "data parallelism with sharded weights (FSDP)", low=-1)
    expert: int = free_key(1, "expert and tensor parallelism", low=-1)
    sequence_parallel: bool = free_key(False, "shard activations along L between blocks")

    @property
    def shape(self) -> dict[str, int]:
        """The size of every axis, as given."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Sampling in `uoe generate` and at the end of training."""

    prompt: str = free_key("def ", "start of the text")
    max_tokens: int = free_key(160, "maximum number of new tokens, as the context allows", low=1)
    temperature: float = free_key(0.7, "sampling temperature; 0: greedy", low=0, high=1e3)
    top_k: int = free_key(0, "sample among the k likeliest tokens; 0: all", low=0)
    top_p: float = free_key(
        0.95, "nucleus sampling: total probability of the candidates", above=0, high=1
    )
    seed: int = free_key(0, "seed of the sampling", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    guard: GuardConfig = GuardConfig()
    generate: GenerateConfig = GenerateConfig()

    @property
    def decay_steps(self) -> int:
        return self.optimizer.decay_steps or self.train.steps

    @property
    def eval_batch_size(self) -> int:
        return self.eval.batch_size or self.train.batch_size
