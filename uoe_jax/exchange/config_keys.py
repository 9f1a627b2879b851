"""Reads a model's JSON files in Hugging Face's layout; skips no key that changes the model.

Every key is read with its type, or changes nothing here (`IGNORED`), or has the value that its
class has anyway (`DEFAULTS`). Any other key is refused. The lists are of `transformers` 4.57 and
5.24 and of files published with them.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from uoe_jax.errors import UserError
from uoe_jax.workdir import read_json

REQUIRED = object()  # in place of a default

# Does not change what the dense model computes: names and dates, switches of caches and kernels,
# initialisation, dropout (import sets model.dropout=0), how the loss is summed, and settings of
# generation, which generation_config.json keeps.
IGNORED = """
    _name_or_path name_or_path _commit_hash transformers_version model_type torch_dtype dtype
    tokenizer_class finetuning_task task_specific_params prefix license language unsloth_fixed
    unsloth_version is_llama_config transformers.js_config max_sequence_length model_max_length
    seq_length max_window_layers _attn_implementation attn_implementation
    _attn_implementation_autoset _attn_implementation_internal _experts_implementation
    experts_implementation _flash_attn_2_enabled use_flash_attention use_flash_attention_2 use_cache
    gradient_checkpointing chunk_size_feed_forward pretraining_tp output_past xla_device torchscript
    use_bfloat16 tf_legacy_loss return_dict output_attentions output_hidden_states output_scores
    return_dict_in_generate initializer_range loss_type neftune_noise_alpha attention_dropout
    attn_pdrop embd_pdrop resid_pdrop hidden_dropout_prob attention_probs_dropout_prob
    classifier_dropout summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj predict_special_tokens n_special id2label label2id num_labels _num_labels
    is_decoder bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id mask_token_id
    bos_token eos_token pad_token unk_token pooler_act pooler_output_size encoder_stride
""".split()


def _by_key(*rows: tuple[str, Any]) -> dict[str, Any]:
    return {key: value for keys, value in rows for key in keys.split()}


# Of every class: any other value but null changes the model, or how it is used.
DEFAULTS = _by_key(
    ("cross_attention_hidden_size quantization_config auto_map", None),
    ("add_cross_attention is_encoder_decoder tie_encoder_decoder rope_interleaved", False),
    ("use_mrope use_parallel_residual use_qk_norm qk_norm qk_layernorm use_bias", False),
    ("pruned_heads", {}),
    ("is_causal", True),
    ("partial_rotary_factor", 1),
    ("problem_type", "single_label_classification"),
)

# How `generate` of transformers samples; here that is generate.*. Exported again with the file.
GENERATION = _by_key(
    ("do_sample early_stopping remove_invalid_values renormalize_logits token_healing", False),
    ("temperature top_p typical_p length_penalty repetition_penalty", 1),
    ("encoder_repetition_penalty num_beams num_beam_groups num_return_sequences", 1),
    ("epsilon_cutoff eta_cutoff min_length diversity_penalty", 0),
    ("no_repeat_ngram_size encoder_no_repeat_ngram_size", 0),
    ("top_k", 50),
    ("max_length", 20),
    ("min_p top_h max_new_tokens min_new_tokens max_time stop_strings bad_words_ids", None),
    ("force_words_ids sequence_bias suppress_tokens begin_suppress_tokens", None),
    ("forced_bos_token_id forced_eos_token_id decoder_start_token_id penalty_alpha", None),
    ("exponential_decay_length_penalty dola_layers guidance_scale constraints", None),
    ("watermarking_config chat_format max_window_size", None),
)

# Of generation_config.json: names, ends (data.ends reads them), caches, speculative decoding.
IGNORED_IN_GENERATION = """
    _from_model_config transformers_version bos_token_id eos_token_id pad_token_id use_cache
    cache_implementation cache_config return_legacy_cache disable_compile compile_config
    prefill_chunk_size max_cache_len low_memory continuous_batching_config is_assistant
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    assistant_early_exit assistant_lookbehind assistant_ensemble_weight target_lookbehind
    prompt_lookup_num_tokens max_matching_ngram_size speculation_type use_mtp trust_remote_code
    output_attentions output_hidden_states output_scores output_logits return_dict_in_generate
""".split()


class Keys:
    """The values of one JSON file, read by key and type; UserError for a value of another type and
    a missing key without default. `close` refuses the keys that were not read."""

    def __init__(self, file: str, values: Mapping[str, Any]) -> None:
        self.file, self._values, self._read = file, values, set[str]()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = None) -> Any:
        """A value of any type."""
        self._read.add(key)
        return self._values.get(key, default)

    def whole(self, key: str, default: Any = REQUIRED, also: Sequence[str] = ()) -> Any:
        """An int of at least 1, or the default for null. also: other names of the same key."""
        names, what = (key, *also), "a whole number of at least 1"
        return self._checked(names, default, lambda v: type(v) is int and v >= 1, what)

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """A finite float above 0, or the default for null."""
        value = self._checked((key,), default, _is_number, "a number above 0")
        return value if value is None else float(value)

    def flag(self, key: str, default: bool) -> Any:
        return self._checked((key,), default, lambda v: type(v) is bool, "true or false")

    def only(self, key: str, *known: Any) -> Any:
        """A key of which only some values work, the first where it is missing."""
        value = self.get(key, known[0])
        if not _among(value, known):
            raise self._no_block(key, value, (_shown(v) for v in known if v is not None))
        return value

    def name(self, key: str, names: Mapping[str, Any]) -> Any:
        """What `names` maps a string to."""
        value = self.get(key)
        if not isinstance(value, str) or value not in names:
            raise self._no_block(key, value, map(repr, names))
        return names[value]

    def names(self, key: str, known: Sequence[str]) -> None:
        """A list of known strings, in any case, or null."""
        value, lower = self.get(key) or [], [name.lower() for name in known]
        if not isinstance(value, list) or any(str(name).lower() not in lower for name in value):
            raise self._no_block(key, value, known)

    def section(self, key: str) -> "Keys | None":
        """The keys of an object inside; None where it is missing, empty or null."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, value, "give an object")
        return Keys(f"{self.file}: {key}", value) if value else None

    def close(self, ignored: Collection[str], defaults: Mapping[str, Any]) -> None:
        """Refuses every key not read nor ignored whose value is neither null nor the default."""
        for key, value in self._values.items():
            is_default = key in defaults and _among(value, [defaults[key]])
            if value is None or is_default or key in self._read or key in ignored:
                continue
            unknown = "may change what the model computes, and is not known here"
            what = "is not supported here" if key in defaults else unknown
            raise self.wrong(key, value, f"which {what}; take it out if the weights do without it")

    def wrong(self, key: str, value: object, remedy: str) -> UserError:
        mark = ";" if remedy.startswith("give ") else ","
        return UserError(f"{self.file} has {key}={_shown(value)}{mark} {remedy}")

    def _no_block(self, key: str, value: object, known: Iterable[str]) -> UserError:
        works = ", ".join(known) or "leaving it out"
        return self.wrong(key, value, f"for which there is no block here (what works: {works})")

    def _checked(
        self, names: Sequence[str], default: Any, fits: Callable[[Any], bool], what: str
    ) -> Any:
        """The value of a key of these names; the default where all are missing or null."""
        found = {name: self._values[name] for name in names if self.get(name) is not None}
        if not found and default is not REQUIRED:
            return default
        if not found:
            null = ", or only null" if names[0] in self._values else ""
            remedy = "give a whole model, as save_pretrained writes it"
            raise UserError(f"{self.file} has no {names[0]}{null}; {remedy}")
        (name, value), *others = found.items()
        if any(other != value for _, other in others):
            both = " and ".join(f"{name}={_shown(value)}" for name, value in found.items())
            raise UserError(f"{self.file} has {both}; make them one")
        if not fits(value):
            raise self.wrong(name, value, f"give {what}")
        return value


def _among(value: Any, known: Sequence[Any]) -> bool:
    """Whether a value is one of these; 1 is not true."""
    return any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in known)


def _is_number(value: Any, above: float = 0) -> bool:
    return type(value) in (int, float) and above < value < math.inf


def _shown(value: object) -> str:
    text = json.dumps(value) if isinstance(value, (dict, list)) else repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


GENERATION_FILE, PROCESSOR_FILE = "generation_config.json", "preprocessor_config.json"
AGAIN = "download the model again"
# Of preprocessor_config.json: names and formats. Images are RGB and of the model's size here.
_IGNORED_IN_PROCESSOR = """
    image_processor_type feature_extractor_type processor_class _processor_class resample
    do_convert_rgb data_format input_data_format device disable_grouping return_tensors
    default_to_square size crop_size pad_size
""".split()
_OF_VIT = "ViTFeatureExtractor ViTImageProcessor ViTImageProcessorFast ViTImageProcessorPil".split()


def generation_notes(place: epath.Path, theirs: Mapping[str, Any]) -> list[str]:
    """Sentences on settings of generation that `uoe generate` does not follow; UserError where
    generation_config.json has a key that is not known."""
    beside = read_json(place / GENERATION_FILE, AGAIN) or {}
    Keys(GENERATION_FILE, beside).close({*IGNORED_IN_GENERATION, *GENERATION}, {})
    notes = []
    for file, values in (("config.json", theirs), (GENERATION_FILE, beside)):
        found = [k for k in GENERATION if not _among(values.get(k), (None, GENERATION[k]))]
        if found:
            settings = ", ".join(f"{key}={_shown(values[key])}" for key in found)
            why = "for generation, which uoe generate does not follow; it takes generate.*"
            notes.append(f"{file} has {settings} {why}")
    return notes


def image_bound(place: epath.Path, image: Mapping[str, Any], is_overridden: bool) -> float:
    """`model.image.bound` that scales pixels as preprocessor_config.json does; 1 without it.

    There a pixel v of 0 to 255 becomes (v * rescale_factor - mean) / std; here it lies between
    -bound and bound. transformers 5 reads `image_processor` of processor_config.json first.
    image: the section of `model`. UserError where no bound scales so, unless it is overridden.
    """
    given = {PROCESSOR_FILE: read_json(place / PROCESSOR_FILE, AGAIN)}
    nested = read_json(place / "processor_config.json", AGAIN) or {}
    given["processor_config.json"] = nested.get("image_processor")
    there = {file: values for file, values in given.items() if isinstance(values, dict)}
    found = {f: _bound(Keys(f, values), image, is_overridden) for f, values in there.items()}
    if len({*found.values()}) > 1:
        raise UserError(f"{' and '.join(found)} scale pixels differently; take one of them away")
    return next(iter(found.values()), 1.0)


def _bound(keys: Keys, image: Mapping[str, Any], is_overridden: bool) -> float:
    kind = keys.get("image_processor_type") or keys.get("feature_extractor_type")
    rescaled, normalised = keys.flag("do_rescale", True), keys.flag("do_normalize", True)
    factor = keys.number("rescale_factor", 1 / 255)
    mean, std = (_channels(keys, name, image["channels"]) for name in ("image_mean", "image_std"))
    _check_size(keys, image["height"])
    keys.close(_IGNORED_IN_PROCESSOR, {"do_pad": False})
    if is_overridden:
        return 1.0  # replaced by the override
    if kind not in (None, *_OF_VIT) and not ("image_mean" in keys and "image_std" in keys):
        remedy = "whose image_mean and image_std are not known here; write them into it"
        raise keys.wrong("image_processor_type", kind, remedy)
    scale = factor if rescaled else 1.0
    mean, std = (mean, std) if normalised else ([0.0], [1.0])
    bound = float(f"{127.5 * (scale / std[0]):.10g}")
    alike = len({*std}) == 1
    if alike and all(math.isclose(m / std[0], bound, rel_tol=1e-5) for m in mean):
        return bound
    what = f"image_mean={mean} and image_std={std} after pixels times {scale:.6g}"
    why = "pixels are scaled alike in all channels and around 0 here"
    remedy = "give --config.model.image.bound=2 to take the weights all the same"
    raise UserError(f"{keys.file} has {what}, and {why}; {remedy}")


def _channels(keys: Keys, name: str, n_channels: int) -> list[float]:
    """A number for all channels, or a list of one for each."""
    value = keys.get(name)
    found = [0.5] if value is None else value if isinstance(value, list) else [value]
    low, above = (0.0, ", above 0") if name == "image_std" else (-math.inf, "")
    if not all(_is_number(v, low) for v in found):
        raise keys.wrong(name, value, f"give a number for each channel{above}")
    if isinstance(value, list) and len(found) != n_channels:
        raise keys.wrong(name, value, f"and config.json num_channels={n_channels}; make them one")
    return [float(v) for v in found]


def _check_size(keys: Keys, wanted: int) -> None:
    """UserError where images are made another size than config.json says."""
    resized, cropped = keys.flag("do_resize", True), keys.flag("do_center_crop", False)
    key = "crop_size" if cropped else "size"
    value = keys.get(key)
    sides = [*value.values()] if isinstance(value, dict) else value
    sides = sides if isinstance(sides, list) else [sides]
    is_other = any(type(side) is not int or side != wanted for side in sides)
    if value is not None and (resized or cropped) and is_other:
        raise keys.wrong(key, value, f"and config.json image_size={wanted}; make them one")
