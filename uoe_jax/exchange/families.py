"""Families of dense models in Hugging Face's layout, read in both directions; no jax is imported.

A family maps a config.json to our `model` section and back. Our model is of a family exactly where
mapping it to a config.json and back gives the same model. Layouts: the `modeling_*.py` files of
`transformers` 5.24.
"""

from typing import Any, Callable, Iterator, Mapping

from uoe_jax.config.load import to_dict
from uoe_jax.config.schema import ModelConfig
from uoe_jax.errors import UserError
from uoe_jax.exchange import layouts
from uoe_jax.exchange.config_keys import DEFAULTS, GENERATION, IGNORED, REQUIRED, Keys
from uoe_jax.exchange.layouts import FLAT, Entry, Values, affine, entry, layer_norm, linear

SIZES = dict(hidden_size="d_model", num_attention_heads="n_heads", num_hidden_layers="n_layers")
SIZES |= dict(intermediate_size="d_hidden")
LENGTH = "original_max_position_embeddings"
SCALING = ("factor", "low_freq_factor", "high_freq_factor", LENGTH)  # of llama3
THETA, MISTRAL_WINDOW = 10000.0, 4096  # of their classes, where config.json has none


class Family:
    """One layout."""

    kind: str  # its name in errors
    classes: dict[str, tuple[str, ...]]  # {model_type: its classes, the exported one first}
    sizes: dict[str, str]  # {their key: our key of `model`}
    activation: tuple[str, dict[str, str]]  # their key, and {their name: ours}
    norm_eps: str  # their key
    fixed: Values  # keys of `model` that are the same in all of its models
    needs: str  # the keys of `model` that a model of it has, for errors
    prefix = ""  # of names of tensors, which old files leave out
    model: Callable[[Keys, Values], Values]  # the other keys of `model`
    config: Callable[[ModelConfig], Values]  # the inverse, with model_type
    entries: Callable[[ModelConfig], Iterator[Entry]]  # all tensors

    def read(self, theirs: Mapping[str, Any]) -> Values:
        """Our `model` section of a config.json; UserError for what is not supported or known."""
        keys, (activation, names) = Keys("config.json", theirs), self.activation
        also, names_of = layouts.ALIASES, self.sizes.items()
        sizes = {ours: keys.whole(name, also=also.get(name, ())) for name, ours in names_of}
        own = {"activation": keys.name(activation, names), "norm_eps": keys.number(self.norm_eps)}
        model = sizes | own | self.fixed | self.model(keys, sizes)
        keys.names("architectures", self.classes[theirs["model_type"]])
        keys.close({*IGNORED, *GENERATION}, DEFAULTS)
        return model

    def write(self, m: ModelConfig) -> Values:
        """The inverse of `read`, of a model of the family."""
        theirs, (activation, names) = self.config(m), self.activation
        # An activation without a name there keeps ours, which is not read back.
        named = next((name for name, own in names.items() if own == m.activation), m.activation)
        theirs["architectures"] = [self.classes[theirs["model_type"]][0]]
        theirs |= {name: getattr(m, ours) for name, ours in self.sizes.items()}
        return theirs | {activation: named, self.norm_eps: m.norm_eps}


class _Llama(Family):
    kind = "Llama, Mistral or Qwen2"
    classes = {
        "llama": ("LlamaForCausalLM", "LlamaModel"),
        "mistral": ("MistralForCausalLM", "MistralModel"),
        "qwen2": ("Qwen2ForCausalLM", "Qwen2Model"),
    }
    sizes = SIZES | {"vocab_size": "vocab_size"}
    activation, norm_eps = ("hidden_act", layouts.GATED), "rms_norm_eps"
    fixed = dict(norm="rmsnorm", qk_norm=False, position="rope", bias=False, cutoffs="")
    fixed |= dict(task="language", stem="tokens", causal=True)
    needs = "norm='rmsnorm', position='rope', activation='swiglu' and bias=False (Llama, as in "
    needs += "--config=uoe_1b)"

    def model(self, keys: Keys, sizes: Values) -> Values:
        kind, heads = keys.get("model_type"), sizes["n_heads"]
        keys.only("head_dim", None, sizes["d_model"] // heads)
        keys.only("attention_bias", False, None, *[True] * (kind == "qwen2"))
        keys.only("mlp_bias", False, None)
        keys.only("use_sliding_window", False, None)
        keys.names("layer_types", ["full_attention"])
        context = keys.whole("max_position_embeddings")
        kv_heads = keys.whole("num_key_value_heads", heads)
        if kind == "mistral":
            default = context if "sliding_window" in keys else MISTRAL_WINDOW
            context = min(context, keys.whole("sliding_window", default))
            kv_heads = kv_heads if "num_key_value_heads" in keys else 8
        elif kind == "qwen2":
            keys.get("sliding_window")  # use_sliding_window turns it off
        # transformers 5 writes `rope_parameters`, 4 `rope_theta` and `rope_scaling`.
        own = ("rope_theta", LENGTH)
        top = {name: keys.number(name) for name in own if keys.get(name) is not None}
        sections = (keys.section(name) for name in ("rope_parameters", "rope_scaling"))
        found = {_rope(section, top) for section in sections if section}
        if len(found) > 1:
            both = "rope_parameters and rope_scaling that differ"
            raise UserError(f"{keys.file} has {both}; make them one")
        theta, scaling = found.pop() if found else (top.get("rope_theta", THETA), "")
        tied = keys.flag("tie_word_embeddings", False)
        more = dict(rope_theta=theta, rope_scaling=scaling, qkv_bias=kind == "qwen2")
        return dict(n_kv_heads=kv_heads, context_length=context, tie_embeddings=tied, **more)

    def config(self, m: ModelConfig) -> Values:
        scaling: Values | None = None
        if m.rope_stretch:
            scaling = {"rope_type": "llama3", **dict(zip(SCALING, m.rope_stretch))}
            scaling[LENGTH] = int(m.rope_stretch[-1])
        rope = {"rope_theta": m.rope_theta, **(scaling or {"rope_type": "default"})}
        return {
            "model_type": "qwen2" if m.qkv_bias else "llama",
            "num_key_value_heads": m.kv_heads,
            "max_position_embeddings": m.context_length,
            "tie_word_embeddings": m.tie_embeddings,
            # The same for transformers 4 and for 5, which each read only their own keys.
            "rope_theta": m.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": rope,
        }

    def entries(self, m: ModelConfig) -> Iterator[Entry]:
        yield entry("model.embed_tokens.weight", "embedding")
        if not m.tie_embeddings:
            yield entry("lm_head.weight", "head", linear())
        yield entry("model.norm.weight", "norm.scale")
        layer = "model.layers.{i}."
        yield entry(layer + "input_layernorm.weight", "layers.attention_norm.scale")
        yield entry(layer + "post_attention_layernorm.weight", "layers.mlp_norm.scale")
        for x in "qkv":
            yield entry(layer + f"self_attn.{x}_proj.weight", f"layers.attention.w_{x}", linear())
            if m.qkv_bias:
                yield entry(layer + f"self_attn.{x}_proj.bias", f"layers.attention.b_{x}", FLAT)
        yield entry(layer + "self_attn.o_proj.weight", "layers.attention.w_o", linear(2))
        for x in ("gate", "up", "down"):
            yield entry(layer + f"mlp.{x}_proj.weight", f"layers.mlp.w_{x}", linear())


def _rope(keys: Keys, top: Mapping[str, float]) -> tuple[float, str]:
    """(theta, `model.rope_scaling`). top: numbers of config.json itself, which may be repeated."""
    name = "type" if keys.get("rope_type") is None else "rope_type"
    kind = keys.only(name, "default", "llama3", None) or "default"
    if (keys.get("type") or kind) != kind:
        raise keys.wrong("rope_type", kind, f"and type={keys.get('type')!r}; make them one")
    found = {"rope_theta": keys.number("rope_theta", top.get("rope_theta", THETA))}
    for name in SCALING if kind == "llama3" else ():
        found[name] = keys.number(name, top.get(name, REQUIRED))
    for name, value in top.items():
        if found.get(name, value) != value:
            why = f"and config.json itself has {value}; make them one"
            raise keys.wrong(name, found[name], why)
    theta, *scaling = found.values()
    if scaling and not scaling[-1].is_integer():
        raise keys.wrong(LENGTH, scaling[-1], "give a whole number")
    keys.close((), {"partial_rotary_factor": 1, "factor": 1})
    return theta, ",".join(f"{number:.12g}" for number in scaling)


_PLAIN_NEEDS = "norm='layernorm', position='learned', activation='gelu', bias=True"
_PLAIN = dict(norm="layernorm", qk_norm=False, position="learned", rope_scaling="", cutoffs="")
_PLAIN |= dict(bias=True, qkv_bias=False)


class _GPT2(Family):
    kind, prefix, needs = "GPT-2", "transformer.", f"{_PLAIN_NEEDS} (GPT-2)"
    classes = {"gpt2": ("GPT2LMHeadModel", "GPT2Model")}
    sizes = dict(n_embd="d_model", n_head="n_heads", n_layer="n_layers", vocab_size="vocab_size")
    sizes |= dict(n_positions="context_length")
    activation, norm_eps = ("activation_function", layouts.PLAIN), "layer_norm_epsilon"
    fixed = dict(task="language", stem="tokens", causal=True, **_PLAIN)

    def model(self, keys: Keys, sizes: Values) -> Values:
        keys.only("scale_attn_weights", True)
        keys.only("scale_attn_by_inverse_layer_idx", False, None)
        keys.only("reorder_and_upcast_attn", False, None)
        width = keys.whole("n_inner", 4 * sizes["d_model"])
        tied = keys.flag("tie_word_embeddings", True)
        return dict(n_kv_heads=sizes["n_heads"], d_hidden=width, tie_embeddings=tied)

    def config(self, m: ModelConfig) -> Values:
        tied = {"tie_word_embeddings": m.tie_embeddings}
        return {"model_type": "gpt2", "n_inner": m.d_hidden, **tied}

    def entries(self, m: ModelConfig) -> Iterator[Entry]:
        yield entry("transformer.wte.weight", "embedding")
        yield entry("transformer.wpe.weight", "positions")
        if not m.tie_embeddings:
            yield entry("lm_head.weight", "head", linear())
        layer, heads, mlp = "transformer.h.{i}.", "layers.attention.", "layers.mlp."
        yield from layer_norm("transformer.ln_f", "norm")
        yield from layer_norm(layer + "ln_1", "layers.attention_norm")
        yield from layer_norm(layer + "ln_2", "layers.mlp_norm")
        for kind, form, x in (("weight", layouts.kernel(), "w"), ("bias", FLAT, "b")):
            yield Entry(f"{layer}attn.c_attn.{kind}", tuple(f"{heads}{x}_{y}" for y in "qkv"), form)
        yield from affine(
            layer + "attn.c_proj", layouts.kernel(2), heads + "w_o", heads + "bias_out"
        )
        yield from affine(layer + "mlp.c_fc", layouts.kernel(), mlp + "w_up", mlp + "b_up")
        yield from affine(layer + "mlp.c_proj", layouts.kernel(), mlp + "w_down", mlp + "bias_out")


class _ViT(Family):
    kind, needs = "ViT", f"{_PLAIN_NEEDS}, classifier.pooling='cls' (ViT)"
    classes = {"vit": ("ViTForImageClassification", "ViTModel")}
    sizes, activation, norm_eps = SIZES, ("hidden_act", layouts.PLAIN), "layer_norm_eps"
    fixed = dict(task="classify", stem="image", causal=False, vocab_size=0, **_PLAIN)

    def model(self, keys: Keys, sizes: Values) -> Values:
        keys.only("qkv_bias", True)
        keys.get("tie_word_embeddings")  # there is nothing to tie
        size, patch = keys.whole("image_size"), keys.whole("patch_size")
        if size % patch:
            why = f"which patch_size={patch} does not divide; only whole squares work"
            raise keys.wrong("image_size", size, why)
        keys.section("id2label")  # an object, or null
        n_labels = len(keys.get("id2label") or ())
        n_classes = keys.whole("num_labels", n_labels or 2)
        if n_labels and n_classes != n_labels:
            why = f"and {n_labels} names in id2label; make them one"
            raise keys.wrong("num_labels", n_classes, why)
        classifier = dict(n_classes=n_classes, pooling="cls", n_inputs=1, d_head=0)
        image = dict(height=size, width=size, channels=keys.whole("num_channels"), patch=patch)
        sizes = dict(n_kv_heads=sizes["n_heads"], context_length=(size // patch) ** 2)
        return dict(**sizes, classifier=classifier, image=image)

    def config(self, m: ModelConfig) -> Values:
        labels = {str(i): f"LABEL_{i}" for i in range(m.classifier.n_classes)}
        return {
            "model_type": "vit",
            "image_size": m.image.height,
            "patch_size": m.image.patch,
            "num_channels": m.image.channels,
            "id2label": labels,
            "label2id": {label: int(i) for i, label in labels.items()},
            "qkv_bias": True,
        }

    def entries(self, m: ModelConfig) -> Iterator[Entry]:
        stem, layer = "vit.embeddings.", "vit.encoder.layer.{i}."
        heads, mlp = "layers.attention.", "layers.mlp."
        yield entry(stem + "cls_token", "cls", layouts.under(2))
        yield entry(stem + "position_embeddings", "positions", layouts.under(1))
        squares = layouts.pixels(m.image.patch, m.image.channels)
        projection = stem + "patch_embeddings.projection"
        yield from affine(projection, squares, "project.kernel", "project.bias")
        yield from affine("classifier", linear(), "classes.kernel", "classes.bias")
        yield from layer_norm("vit.layernorm", "norm")
        yield from layer_norm(layer + "layernorm_before", "layers.attention_norm")
        yield from layer_norm(layer + "layernorm_after", "layers.mlp_norm")
        for theirs, x in (("query", "q"), ("key", "k"), ("value", "v")):
            name = f"{layer}attention.attention.{theirs}"
            yield from affine(name, linear(), f"{heads}w_{x}", f"{heads}b_{x}")
        out = layer + "attention.output.dense"
        yield from affine(out, linear(2), heads + "w_o", heads + "bias_out")
        yield from affine(layer + "intermediate.dense", linear(), mlp + "w_up", mlp + "b_up")
        yield from affine(layer + "output.dense", linear(), mlp + "w_down", mlp + "bias_out")


LLAMA, GPT2, VIT = _Llama(), _GPT2(), _ViT()
FAMILIES: dict[str, Family] = {**dict.fromkeys(LLAMA.classes, LLAMA), "gpt2": GPT2, "vit": VIT}


def family_for(m: ModelConfig) -> tuple[Family, Values]:
    """(the family whose layout has the dense model, its config.json); UserError without one."""
    family: Family = VIT if m.stem == "image" else GPT2 if m.norm == "layernorm" else LLAMA
    theirs = family.write(m)
    try:
        back = family.read(theirs)
    except UserError:  # only an activation without a name in the family is not read back
        back = {"activation": None}
    other = next(differences(to_dict(m) | {"n_kv_heads": m.kv_heads}, back), None)
    if other is None:
        return family, theirs
    key, value, wanted = other
    has = "another" if wanted is None else repr(wanted)
    why = f"the layout of {family.kind} has {has}, so no model of Hugging Face's own loads these"
    fitting = (VIT,) if m.stem == "image" else (LLAMA, GPT2) if m.task == "language" else ()
    train = ", or train with " + " or ".join(f.needs for f in fitting) if fitting else ""
    routed = "--routed, or with " if m.task == "language" else ""
    remedy = f"export with {routed}--format=safetensors{train}"
    raise UserError(f"config.model.{key}={value!r}: {why} weights; {remedy}")


def differences(own: Values, wanted: Values, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, own value, the one wanted) wherever these differ."""
    for key, value in wanted.items():
        if isinstance(value, dict):
            yield from differences(own[key], value, f"{at}{key}.")
        elif own[key] != value:
            yield f"{at}{key}", own[key], value
