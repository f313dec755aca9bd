"""A converted model as a folder that carries its own modelling code.

The folder is a converted one of plain sizes, with frequencies written out layer by layer, and one
file of code: transformers loads it with ``trust_remote_code``, and vLLM's Transformers backend
finds its own latent attention in it. mlakit's classes load it as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mlakit.engines.fitting import Fitting, layer_frequencies
from mlakit.engines.shapes import Shape
from mlakit.spec import AttentionSpec

if TYPE_CHECKING:
    import torch

CODE = "modeling_mlakit"
"""Name of the file of code, without its ending; the package's own copy is for Llama."""


@dataclass(frozen=True)
class OwnCode:
    """The maths and the files of one export.

    Args:
        config: ``config.json`` of the converted model.
        shape: sizes to export to.
    """

    config: dict[str, Any]
    shape: Shape
    unties: ClassVar[bool] = False

    @cached_property
    def family(self) -> str:
        """transformers' ``model_type`` of the source."""
        return str(self.config["model_type"]).removeprefix("mla_")

    def attention(
        self, tensors: dict[str, torch.Tensor], layer: AttentionSpec
    ) -> dict[str, torch.Tensor]:
        """A layer's attention at the new sizes; see `Fitting.attention`."""
        return Fitting(layer, self.shape).attention(tensors)

    def other(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A tensor outside of attention: as it is."""
        return {name: tensor}

    def exported_config(self) -> dict[str, Any]:
        """``config.json`` of the result."""
        shape, names = self.shape, class_names(self.family)
        frequencies, factor = layer_frequencies(self.config, shape.rope)
        found = self.config | {
            "kv_lora_rank": shape.rank,
            "kv_lora_ranks": None,
            "qk_rope_head_dim": shape.rope,
            "qk_nope_head_dim": shape.nope,
            "v_head_dim": shape.value,
            "head_dim": shape.rank + shape.rope,
            "rope_inv_freq": frequencies,
            "rope_attention_factor": factor,
            "query_up": False,
            "auto_map": {
                "AutoConfig": f"{CODE}.{names['MLALlamaConfig']}",
                "AutoModel": f"{CODE}.{names['MLALlamaModel']}",
                "AutoModelForCausalLM": f"{CODE}.{names['MLALlamaForCausalLM']}",
            },
        }
        if "logits_scaling" in found:  # Granite's; vLLM asks for the inverse, under another name
            found["logit_scale"] = 1 / found["logits_scaling"]
        return found

    def files(self) -> dict[str, str]:
        """Texts to write beside the weights, by name."""
        return {f"{CODE}.py": code(self.family)}


def code(family: str) -> str:
    """The file of code for a family: the package's own, with the family's names for Llama's."""
    text = Path(__file__).with_name(f"{CODE}.py").read_text(encoding="utf-8")
    for llama, name in class_names(family).items():
        text = text.replace(llama, name)
    return text


def class_names(family: str) -> dict[str, str]:
    """What stands for each name of Llama's in the file of code, the longest first."""
    from mlakit.nn.configs import CONFIGS
    from mlakit.nn.models import MODELS

    config: Any = CONFIGS[family]
    source = config.__mro__[2]
    bare, causal = (model.__mro__[2] for model in MODELS[family])
    module = source.__module__
    return {
        "transformers.models.llama.configuration_llama": module,
        "transformers.models.llama.modeling_llama": module.replace(".configuration_", ".modeling_"),
        "MLALlamaConfig": config.__name__,
        "MLALlamaModel": MODELS[family][0].__name__,
        "MLALlamaForCausalLM": MODELS[family][1].__name__,
        '"mla_llama"': f'"mla_{family}"',
        "LlamaConfig": source.__name__,
        "LlamaModel": bare.__name__,
        "LlamaForCausalLM": causal.__name__,
        "A Llama whose": f"A {source.__name__.removesuffix('Config')} whose",
    }
