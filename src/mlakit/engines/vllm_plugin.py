"""vLLM's way to converted folders: where mlakit is installed beside vLLM, they load as they are.

vLLM finds `register` by the entry point ``vllm.general_plugins`` and calls it in each of its
processes. Sizes are those of vLLM's kernels: what a model has less is filled up with zeros as it is
loaded, and said. What the class there (``vllm_model``) cannot compute is refused by name, before
any weight is read. Facts are those of vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import logging
from typing import Any

from mlakit.engines.shapes import Shape, own_shape, sizes_in_words, smallest_shape
from mlakit.engines.targets import PLUGIN_DECODERS, TARGETS, VLLM_CPU_WIDTHS
from mlakit.errors import UnsupportedModelError
from mlakit.families import read_model
from mlakit.spec import ModelSpec

TARGET = "vllm-plugin"
MODEL = "mlakit.engines.vllm_model:LatentForCausalLM"


def register() -> None:
    """Tells vLLM about converted checkpoints; may be called again."""
    try:
        from vllm import ModelRegistry
        from vllm.transformers_utils.model_arch_config_convertor import (
            MODEL_ARCH_CONFIG_CONVERTORS,
            ModelArchConfigConvertorBase,
        )
    except ImportError as error:  # another vLLM: every other model must load there nevertheless
        _log().warning("mlakit's models do not load in this vLLM, 0.32 is needed: %s", error)
        return
    from transformers import AutoConfig

    from mlakit.nn.configs import CONFIGS

    class LatentArchConfig(ModelArchConfigConvertorBase):
        """What vLLM wants to know of a converted model before it is built."""

        def convert(self, *args: Any, **kwargs: Any) -> Any:
            if not self.runs_own_code():
                fit(self.hf_text_config)
            return super().convert(*args, **kwargs)

        def runs_own_code(self) -> bool:
            """Whether the folder brings code for a family that the class here has not."""
            family = self.hf_text_config.model_type.removeprefix("mla_")
            return family not in PLUGIN_DECODERS and hasattr(self.hf_config, "auto_map")

        def is_deepseek_mla(self) -> bool:
            return not self.runs_own_code()

        def get_head_size(self) -> int:
            return int(self.hf_text_config.head_dim)

    for family, config in CONFIGS.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        MODEL_ARCH_CONFIG_CONVERTORS[config.model_type] = LatentArchConfig
        if family in PLUGIN_DECODERS:
            ModelRegistry.register_model(config.__name__.replace("Config", "ForCausalLM"), MODEL)


def fit(config: Any) -> None:
    """Gives a config the sizes that vLLM's kernels take; ``config.stored`` keeps the file's own.

    Args:
        config: of a converted model; one that was fitted is left alone.

    Raises:
        UnsupportedModelError: the class in vLLM cannot compute this model, for every reason there
            is, or the folder is of a newer mlakit.
    """
    if hasattr(config, "stored"):
        return
    stored = config.to_dict()
    spec = read_model(stored)
    shape = servable_shape(stored, spec, *_platform())
    width, widest = shape.rank + shape.rope, max(layer.cache_width for layer in spec.layers)
    if width > widest:
        _log().warning(
            "vLLM's kernels take rows of %d numbers: this model's %d are filled up with zeros, and"
            " the zeros are cached (mlakit convert --for %s chooses sizes without)",
            width,
            widest,
            TARGET,
        )
    if stored.get("cache_format"):
        _log().warning(
            "vLLM has no cache in %s, which this model was converted for: it caches numbers of"
            " --kv-cache-dtype here, more bytes per token than the model card says (mlakit serve"
            " caches as the card says)",
            stored["cache_format"],
        )
    config.kv_lora_ranks = None
    config.kv_lora_rank, config.qk_rope_head_dim = shape.rank, shape.rope
    config.qk_nope_head_dim, config.v_head_dim = shape.nope, shape.value
    config.head_dim = width
    config.stored = stored


def servable_shape(
    config: dict[str, Any], spec: ModelSpec, on_cpu: bool = False, expanded: bool = False
) -> Shape:
    """The sizes that a converted model has in vLLM.

    Args:
        config: its ``config.json``.
        spec: the same as layers.
        on_cpu: on CPUs, whose kernel takes one width.
        expanded: vLLM was told to cache expanded keys and values.

    Raises:
        UnsupportedModelError: as `fit`.
    """
    from mlakit.nn.configs import FORMAT_VERSION

    target, layers, own = TARGETS[TARGET], spec.layers, own_shape(spec)
    family = spec.family.removeprefix("mla_")
    version = (config.get("mlakit") or {}).get("format_version", FORMAT_VERSION)
    if version > FORMAT_VERSION:
        raise UnsupportedModelError(
            f"the folder has format version {version}, this mlakit reads {FORMAT_VERSION}",
            remedy="upgrade mlakit where vLLM is installed",
        )
    widths = VLLM_CPU_WIDTHS if on_cpu else target.widths
    shape = smallest_shape(own, widths, target.heads, pad=True, holds=lambda wide: True)
    found = {
        f"there is no class for the form {config['mla_form']}": config["mla_form"] != "compress",
        f"its decoder layers are not those of {family}": family not in (target.decoders or ()),
        "it has no sliding windows": any(layer.sliding_window for layer in layers),
        "it does not soft-cap scores": any(layer.logit_softcap for layer in layers),
        "its latents are not made of others": any(s.source_kv_lora_rank for s in layers),
        "it norms heads, not projections": any(s.qk_norm == "projection" for s in layers),
        "weights that were quantised on disk cannot be filled up": "quantization_config" in config
        and config["quantization_config"] is not None,
        "VLLM_MLA_DISABLE is set": expanded,
        sizes_in_words(own, widths, target.heads): shape is None,
    }
    reasons = [reason for reason, there in found.items() if there]
    if reasons or shape is None:
        raise UnsupportedModelError(
            f"mlakit's class in vLLM cannot run this model: {'; '.join(reasons)}",
            remedy="mlakit generate and serve run it as it is; mlakit convert SOURCE"
            f" --for {TARGET} says what can be made of its source, mlakit export FOLDER"
            " --to vllm-transformers takes more families",
        )
    return shape


def _platform() -> tuple[bool, bool]:
    """Whether vLLM runs on CPUs, and whether its latent attention is off."""
    import vllm.envs as envs
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu()), bool(envs.VLLM_MLA_DISABLE)


def _log() -> logging.Logger:
    """A logger whose lines vLLM prints among its own."""
    return logging.getLogger("vllm.mlakit")
