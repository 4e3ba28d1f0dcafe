"""Where the prompts of each set lie along a direction, in the plain model: whether it tells the sets apart at all."""

from __future__ import annotations

from collections.abc import Mapping

from steer.direction import Direction
from steer.lab.activations import Reading
from steer.lab.batches import each_batch
from steer.lab.prompts import PromptSet
from steer.lab.source import Source

POSITION = -1


def projected(
    source: Source,
    direction: Direction,
    sets: Mapping[str, PromptSet],
    system_prompt: str | None = None,
    batch_size: int | None = None,
) -> dict[str, dict[str, list[float]]]:
    """By panel title and set: the component of the last prompt token along the direction's first row, at the layer that
    it came from, else at the last one that it steers."""
    steered = [layer for layer in range(direction.meta.layers) if direction.directions[layer].any()]
    layer = direction.meta.source_layer if direction.meta.source_layer in steered else steered[-1]
    row = direction.directions[layer, 0].float()
    found = {}
    for name, prompts in sets.items():
        encoded = source.encode(prompts.prompts, system_prompt)
        values = [0.0] * len(encoded)

        def run(indices: list[int], encoded=encoded, values=values) -> None:  # type: ignore[no-untyped-def]
            picked = source.run([encoded[i] for i in indices], Reading((POSITION,), layer)).picked[0, layer]
            for i, value in zip(indices, (picked.float().cpu() @ row).tolist(), strict=True):
                values[i] = value

        each_batch([len(e.ids) for e in encoded], run, batch_size=batch_size, tokens=source.pass_tokens)
        found[name] = values
    return {f"layer {layer}, last prompt token": found}
