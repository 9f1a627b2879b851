"""Families of dense models in Hugging Face's layout, read in both directions; no jax is imported.

A family maps a config.json to our `model` section and back. Our model is of a family exactly where
mapping it to a config.json and back gives the same model.
"""

from __future__ import annotations

from typing import Any, Mapping

from uoe_jax.config.schema import ModelConfig, to_dict
from uoe_jax.errors import UserError
from uoe_jax.exchange.config_keys import DEFAULTS, GENERATION, IGNORED, Keys
from uoe_jax.exchange.gpt2 import GPT2
from uoe_jax.exchange.layouts import Family, Values
from uoe_jax.exchange.llama import LLAMA
from uoe_jax.exchange.vit import VIT

FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "gpt2": GPT2, "vit": VIT}
ARCHITECTURES = {  # by model_type
    "llama": ("LlamaForCausalLM", "LlamaModel"),
    "mistral": ("MistralForCausalLM", "MistralModel"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Model"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Model"),
    "vit": ("ViTForImageClassification", "ViTModel"),
}


def family_of(theirs: Mapping[str, Any]) -> Family:
    """The family of a config.json; UserError where it is of none."""
    kind = theirs.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        remedy = f"models of the types {', '.join(FAMILIES)} can be imported"
        raise UserError(f"config.json has model_type={kind!r}; {remedy}")
    return FAMILIES[kind]


def model_of(family: Family, theirs: Mapping[str, Any]) -> Values:
    """Our `model` section of a config.json.

    Raises:
      UserError: a key has a value that has no block here, or is not known.
    """
    keys = Keys("config.json", theirs)
    model = family.model(keys)
    known, named = ARCHITECTURES[theirs["model_type"]], keys.get("architectures") or []
    lower = [name.lower() for name in known]
    if not isinstance(named, list) or any(str(name).lower() not in lower for name in named):
        why = f"for which there is no block here ({', '.join(known)} work)"
        raise keys.wrong("architectures", named, why)
    keys.close(IGNORED | GENERATION.keys(), DEFAULTS)
    return model


def family_for(m: ModelConfig) -> tuple[Family, Values]:
    """(the family whose layout has the dense model of these sizes, its config.json).

    Raises:
      UserError: there is none.
    """
    family = VIT if m.stem == "image" else GPT2 if m.norm == "layernorm" else LLAMA
    theirs = family.config(m)
    try:
        back = model_of(family, theirs)
    except UserError:  # only an activation without a name in the family is not read back
        back = {"activation": None}
    wrong = _first_difference(to_dict(m) | {"n_kv_heads": m.kv_heads}, back, "config.model.")
    if wrong is None:
        return family, theirs
    key, value, wanted = wrong
    has = "another" if wanted is None else repr(wanted)
    why = f"the layout of {family.kind} has {has}, so no model of Hugging Face's own loads these"
    fitting = () if m.task == "classify" else (LLAMA, GPT2)
    needs = " or ".join(f.needs for f in ((VIT,) if m.stem == "image" else fitting))
    train = f", or train with {needs}" if needs else ""
    routed = "--routed, or with " if m.task == "language" else ""
    remedy = f"export with {routed}--format=safetensors{train}"
    raise UserError(f"{key}={value!r}: {why} weights; {remedy}")


def _first_difference(
    own: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str
) -> tuple[str, Any, Any] | None:
    for key, wanted in theirs.items():
        if isinstance(wanted, Mapping):
            if found := _first_difference(own[key], wanted, f"{prefix}{key}."):
                return found
        elif own[key] != wanted:
            return f"{prefix}{key}", own[key], wanted
    return None
