"""The configuration: frozen dataclasses, one declaration per key, validated before jax is imported.

A key is declared once, with its type, default, range and a line of documentation (`key`). From that come the
`ConfigDict` a config file edits (`base`), the checks, the error sentences and the list of keys that may change when
a run is resumed. Checks that need several keys are in `checks`.
"""

from __future__ import annotations

import dataclasses
import math

from uoe_jax.config.baselines import (
    ATTENTIONS,
    MLPS,
    UNIONS,
    LinformerConfig,
    LongShortConfig,
    MLAConfig,
    MoEConfig,
    MoHConfig,
    MoSAConfig,
    NystromformerConfig,
    PerformerConfig,
    ReformerConfig,
)
from uoe_jax.config.data import AugmentConfig, DataConfig
from uoe_jax.config.fields import key
from uoe_jax.config.routing import RoutingConfig

GATED_ACTIVATIONS = ("swiglu", "geglu")  # with a second projection into the hidden layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """What follows the blocks of a classifier (model.task='classify')."""

    n_classes: int = key(2, "classes", low=2)
    pooling: str = key(
        "mean",
        "the mean of the valid tokens, or a learned token in front of them",
        choices=("mean", "cls"),
    )
    n_inputs: int = key(
        1, "inputs of an example; two are encoded by the same blocks and compared", low=1, high=2
    )
    d_head: int = key(
        0, "hidden width between the pooled state and the classes; 0: one linear layer", low=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Images as tokens (model.stem='image'): squares of patch x patch pixels, row by row; patch=1 makes pixels tokens."""

    height: int = key(32, "pixels", low=1)
    width: int = key(32, "pixels", low=1)
    channels: int = key(3, "values of a pixel", low=1)
    patch: int = key(4, "side of the square that becomes one token, in pixels", low=1)
    bound: float = key(2.0, "pixels are scaled to lie between -bound and bound", above=0, high=1e3)

    @property
    def values(self) -> int:
        """Values of a token's pixels."""
        return self.patch**2 * self.channels

    @property
    def n_tokens(self) -> int:
        return (self.height // self.patch) * (self.width // self.patch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture: D d_model, F d_hidden, H n_heads, L context_length, V vocab_size."""

    task: str = key(
        "language",
        "predict the next token, or classify the input",
        choices=("language", "classify"),
    )
    stem: str = key("tokens", "what comes in: token ids, or images", choices=("tokens", "image"))
    vocab_size: int = key(0, "V; 0 takes the tokenizer's", low=0)
    d_model: int = key(192, "D, width of the residual stream", low=1)
    n_layers: int = key(4, "number of blocks (attention + MLP)", low=1)
    n_heads: int = key(8, "H, attention heads", low=1)
    n_kv_heads: int = key(0, "key/value heads; 0 means n_heads", low=0)
    d_hidden: int = key(768, "F, hidden width of the whole MLP", low=1)
    context_length: int = key(256, "L, tokens per row", low=1)
    causal: bool = key(
        True, "a token sees itself and those before it only, as a language model must"
    )
    attention: str = key("smha", "attention block", choices=("smha", "dense", *ATTENTIONS))
    mlp: str = key("uome", "MLP block", choices=("uome", "dense", *MLPS))
    activation: str = key(
        "gelu", "MLP activation", choices=("gelu", "gelu_tanh", "relu", *GATED_ACTIVATIONS)
    )
    norm: str = key("rmsnorm", "normalisation before each block", choices=("rmsnorm", "layernorm"))
    norm_eps: float = key(1e-6, "added to the variance in the norm", above=0, high=1)
    qk_norm: bool = key(False, "RMSNorm of every query and key, with one scale for all heads")
    position: str = key("rope", "position information", choices=("rope", "learned", "none"))
    rope_theta: float = key(10000.0, "base of the rotary frequencies", low=1, high=1e12)
    rope_scaling: str = key(
        "",
        "rotary frequencies stretched as in Llama 3.1: 'factor,low,high,length' such as '8,1,4,8192', for contexts longer than length",
    )
    bias: bool = key(False, "biases in projections")
    qkv_bias: bool = key(False, "biases of queries, keys and values alone, as in Qwen2")
    tie_embeddings: bool = key(True, "the output head is the embedding")
    cutoffs: str = key(
        "",
        "adaptive softmax: where the vocabulary, most frequent first, is cut, such as '20000,40000,200000'; empty: one piece",
    )
    cutoff_div: int = key(
        1,
        "each further piece of an adaptive softmax is narrower than D by this factor once more",
        low=1,
    )
    dropout: float = key(0.0, "share of every block's output dropped in training", low=0, high=0.99)
    attention_dropout: float = key(
        0.0, "share of the attention weights dropped in training", low=0, high=0.99
    )
    dtype: str = key(
        "float32",
        "compute dtype; parameters are float32",
        choices=("float32", "bfloat16", "float16"),
    )
    remat: str = key(
        "slots",
        "what the backward pass recomputes: nothing (of fsdp, whole weights are kept); gathered slots and scores; all but matrix products; whole blocks",
        choices=("none", "slots", "dots", "block"),
        free=True,
    )
    smha: RoutingConfig = dataclasses.field(default_factory=RoutingConfig)
    uome: RoutingConfig = dataclasses.field(default_factory=RoutingConfig)
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    mla: MLAConfig = dataclasses.field(default_factory=MLAConfig)
    mosa: MoSAConfig = dataclasses.field(default_factory=MoSAConfig)
    moh: MoHConfig = dataclasses.field(default_factory=MoHConfig)
    linformer: LinformerConfig = dataclasses.field(default_factory=LinformerConfig)
    nystromformer: NystromformerConfig = dataclasses.field(default_factory=NystromformerConfig)
    performer: PerformerConfig = dataclasses.field(default_factory=PerformerConfig)
    reformer: ReformerConfig = dataclasses.field(default_factory=ReformerConfig)
    long_short: LongShortConfig = dataclasses.field(default_factory=LongShortConfig)
    classifier: ClassifierConfig = dataclasses.field(default_factory=ClassifierConfig)
    image: ImageConfig = dataclasses.field(default_factory=ImageConfig)

    @property
    def cutoff_list(self) -> tuple[int, ...]:
        """Where the vocabulary is cut; empty: one piece."""
        return tuple(int(n) for n in self.cutoffs.split(",")) if self.cutoffs else ()

    @property
    def vocabulary_pieces(self) -> tuple[tuple[int, int], ...]:
        """(words, width of their vectors) of every piece of the vocabulary."""
        edges = (0, *self.cutoff_list, self.vocab_size)
        return tuple(
            (end - start, self.d_model // self.cutoff_div**i)
            for i, (start, end) in enumerate(zip(edges, edges[1:]))
        )

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
        """Rows that the blocks work on for one example."""
        return self.classifier.n_inputs if self.task == "classify" else 1

    @property
    def d_pooled(self) -> int:
        """What a classifier's head sees: the pooled state, or what two of them are compared by."""
        return self.d_model * (1 if self.classifier.n_inputs == 1 else 4)

    @property
    def n_into(self) -> int:
        """Projections into the hidden layer of the MLP."""
        return 2 if self.activation in GATED_ACTIVATIONS else 1

    @property
    def block_length(self) -> int:
        """Tokens of a row as the blocks see them: the context, and the classifier's own token where it has one."""
        return self.context_length + (self.task == "classify" and self.classifier.pooling == "cls")

    @property
    def out_scale(self) -> float:
        """Scale of the blocks' output projections: small, and smaller with depth, so that at first the embedding is heard."""
        return 0.3 * (2 * self.n_layers) ** -0.5

    @property
    def rotary_dim(self) -> int:
        """Width of a head's rotary part."""
        return self.mla.rotary_width(self.head_dim) if self.attention == "mla" else self.head_dim

    @property
    def d_expert(self) -> int:
        """Hidden width of an expert of the compared mixtures (model.moe)."""
        return self.moe.d_expert or self.d_hidden // (self.moe.k + self.moe.n_shared)

    @property
    def routed_hidden(self) -> int:
        """Hidden units of all routed experts of the MLP block."""
        return (
            self.moe.n_experts * self.d_expert
            if self.mlp in MLPS
            else (self.d_hidden if self.mlp == "uome" else 0)
        )

    @property
    def whole_hidden(self) -> int:
        """Hidden units that every token goes through: those of a dense MLP, or of shared experts."""
        return (
            self.moe.n_shared * self.d_expert
            if self.mlp in MLPS
            else (self.d_hidden if self.mlp == "dense" else 0)
        )

    @property
    def all_hidden(self) -> int:
        """Hidden units of the whole MLP block."""
        return self.routed_hidden + self.whole_hidden

    def routed(self) -> dict[str, RoutingConfig]:
        """The routing of the blocks that route, by the block's name."""
        found = ((name, self._routing(name)) for name in (self.attention, self.mlp))
        return {name: routing for name, routing in found if routing is not None}

    def _routing(self, name: str) -> RoutingConfig | None:
        if name in UNIONS:
            return getattr(self, name)
        if name in ("mosa", "moh"):
            return getattr(self, name).routing(self.n_heads)
        return self.moe.routing(name) if name in MLPS else None

    def place_of(self, name: str) -> str:
        """Where in a layer the block of this name is: its attention or its MLP."""
        return "attention" if name == self.attention else "mlp"

    def unions(self) -> dict[str, RoutingConfig]:
        """Of these, the unions of experts, which are a dense block cut in partitions."""
        return {name: r for name, r in self.routed().items() if name in UNIONS}

    @property
    def patch_multiple(self) -> int:
        """Documents are padded to a multiple of this, so that no patch holds two documents."""
        return math.lcm(*(r.patch_size for r in self.routed().values()), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warmup and decay."""

    learning_rate: float = key(1e-3, "peak learning rate", above=0, high=1e3)
    warmup_steps: int = key(100, "steps of linear warmup", low=0)
    schedule: str = key(
        "cosine", "how the learning rate falls after the warmup", choices=("cosine", "linear")
    )
    decay_steps: int = key(0, "step at which the decay ends; 0 means train.steps", low=0)
    final_fraction: float = key(
        0.1, "learning rate at the end, relative to the peak", low=0, high=1
    )
    weight_decay: float = key(0.1, "on matrices only", low=0, high=1e3)
    b1: float = key(0.9, "Adam's first moment", low=0, high=0.999999)
    b2: float = key(0.95, "Adam's second moment", low=0, high=0.999999)
    eps: float = key(1e-8, "Adam's epsilon", above=0, high=1)
    clip_norm: float = key(1.0, "global gradient norm; 0 means no clipping", low=0, high=1e9)
    moment_dtype: str = key(
        "float32", "in which Adam's moments are held between steps", choices=("float32", "bfloat16")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = key(1000, "optimizer steps of the whole run", low=1)
    batch_size: int = key(16, "global rows per step", low=1)
    accumulation: int = key(1, "microbatches a step is cut into", low=1)
    seed: int = key(0, "initialisation and data order", low=0)
    log_every: int = key(10, "steps between lines of metrics", low=1, free=True)
    stop_after: int = key(
        0, "end this sitting after so many steps of the run; 0 means train.steps", low=0, free=True
    )
    report: bool = key(True, "at the end, write report.html into the workdir", free=True)
    label_smoothing: float = key(
        0.0,
        "share of a class's target that goes to all classes alike (classifiers)",
        low=0,
        high=0.99,
    )
    init_from: str = key(
        "",
        "workdir of a run, or one of its checkpoints, whose parameters to start from where they fit",
    )
    init_from_any: bool = key(
        False, "start from init_from also where that run has another tokenizer", free=True
    )
    deterministic: bool = key(
        False,
        "every deterministic switch of the backend: on GPUs slower, and the same bits in every run",
        free=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: int = key(200, "steps between evaluations; 0 means only at the end", low=0, free=True)
    batches: int = key(
        0,
        "batches per evaluation; 0 means the whole split, as the last one always does",
        low=0,
        free=True,
    )
    test: bool = key(
        False,
        "at the end, measure the test split, once, with the checkpoint that is best on validation",
        free=True,
    )
    batch_size: int = key(0, "global rows per batch; 0 means train.batch_size", low=0, free=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = key(200, "steps between checkpoints; 0 means only at the end", low=0, free=True)
    keep_latest: int = key(2, "newest checkpoints kept", low=1, free=True)
    keep_best: int = key(
        1,
        "checkpoints kept for the lowest validation loss, or of a classifier the fewest errors",
        low=0,
        free=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What a run does about bad numbers, and about processes that are lost or do not go on."""

    spike_sigmas: float = key(
        0.0,
        "skip a step whose loss or gradient norm is so many standard deviations above its running mean; 0: none. "
        "A level that rises for good is a spike at every step",
        low=0,
        high=1e6,
    )
    max_bad_steps: int = key(
        5,
        "skipped steps in a row after which the run stops with exit code 76, or rolls back",
        low=1,
        free=True,
    )
    rollbacks: int = key(
        0,
        "times a run goes back to its newest checkpoint instead, leaving out the data that led there",
        low=0,
        high=1000,
        free=True,
    )
    peer_timeout_s: float = key(
        10.0, "seconds within which all processes stop once one is lost", low=1, high=1e5, free=True
    )
    hang_timeout_s: float = key(
        300.0,
        "seconds without a step or a batch of evaluation after which all processes stop; 0: never",
        low=0,
        high=1e6,
        free=True,
    )
    compile_timeout_s: float = key(
        1800.0,
        "the same where something is compiled, read or written first",
        low=0,
        high=1e6,
        free=True,
    )


MESH_AXES = ("replica", "data", "fsdp", "expert")  # outermost first


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 and takes what is left."""

    replica: int = key(1, "copies over the slow network", low=-1, free=True)
    data: int = key(-1, "data parallelism", low=-1, free=True)
    fsdp: int = key(1, "rows and weights sharded together", low=-1, free=True)
    expert: int = key(1, "experts (tensor-parallel partitions)", low=-1, free=True)
    sequence_parallel: bool = key(False, "activations sharded along L between blocks", free=True)

    @property
    def shape(self) -> dict[str, int]:
        """The size of every axis, as given."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How `uoe generate` and the sample at the end of training draw tokens."""

    prompt: str = key("def ", "what the text starts with", free=True)
    max_tokens: int = key(
        160,
        "tokens to generate at most; the context length bounds prompt and text together",
        low=1,
        free=True,
    )
    temperature: float = key(0.7, "0 is greedy", low=0, high=1e3, free=True)
    top_k: int = key(0, "keep the k likeliest tokens; 0 keeps all", low=0, free=True)
    top_p: float = key(
        0.95, "keep the likeliest tokens up to this probability", above=0, high=1, free=True
    )
    seed: int = key(0, "of the draws", low=0, free=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)

    @property
    def decay_steps(self) -> int:
        return self.optimizer.decay_steps or self.train.steps

    @property
    def eval_batch_size(self) -> int:
        return self.eval.batch_size or self.train.batch_size
