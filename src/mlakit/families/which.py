"""Which layers of a family have a sliding window or a rotary embedding, by index."""

from __future__ import annotations

from mlakit.families.readers import Config


def upper_layers(config: Config, layer: int) -> bool:
    """Qwen: the window, where it is switched on, begins at ``max_window_layers``."""
    return layer >= config["max_window_layers"]


def lower_even_layers(config: Config, layer: int) -> bool:
    """Qwen2-MoE: the window, where it is switched on, is that of every other lower layer."""
    return layer < config["max_window_layers"] and layer % 2 == 0


def local_layers(config: Config, layer: int) -> bool:
    """Gemma 3: five layers with a window, then one without."""
    return (layer + 1) % (config.get("sliding_window_pattern") or 6) != 0


def all_layers(config: Config, layer: int) -> bool:
    return True


def with_positions(config: Config, layer: int) -> bool:
    """SmolLM3: every fourth layer has no rotary embedding."""
    listed = config.get("no_rope_layers")
    if listed is None:
        return bool((layer + 1) % config["no_rope_layer_interval"])
    return bool(listed[layer])


def no_positions_in_a_window(config: Config, layer: int) -> bool:
    """SmolLM3: the window, where it is switched on, is that of the layers without positions."""
    return not with_positions(config, layer)
