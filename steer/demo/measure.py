"""Measure what a direction does to the demo model: `python -m steer.demo.measure [--model DIR] [--layers 4 5 6]`.

A development tool for whoever changes the recipe in `train.py`; it stands on nothing but torch and transformers.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from steer.demo import MODEL, language
from steer.demo.language import Message, Prompt

Mode: TypeAlias = Literal["plain", "ablate", "one_sided"]
MODES: tuple[Mode, ...] = ("plain", "ablate", "one_sided")
ANSWER_TOKENS = 56
FIT = 192
"""Prompts of each class that a direction is made from."""
SIDE = 96
"""Prompts of each smaller table: system prompts, later turns, unseen words."""


@dataclass(frozen=True, slots=True)
class Demo:
    """A model with its tokenizer, computing in float32 whatever its weights are stored in."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def blocks(self) -> torch.nn.ModuleList:
        return cast(torch.nn.ModuleList, self.model.model.layers)

    def render(self, chats: Sequence[list[Message]]) -> list[str]:
        texts = (self.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats)
        return [cast(str, text) for text in texts]

    def encode(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Padded on the left; the template wrote the BOS, so the tokenizer must not."""
        batch = self.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def load(folder: Path) -> Demo:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Demo(model.train(False), AutoTokenizer.from_pretrained(folder, padding_side="left"))


# -- direction ---------------------------------------------------------------------------------------------------------


def class_means(demo: Demo, chats: Sequence[list[Message]]) -> torch.Tensor:
    """`[layers, d_model]` in float64: each block's output at the last position of the template."""
    outputs: list[torch.Tensor] = []
    hooks = [b.register_forward_hook(lambda _m, _a, out: outputs.append(out[:, -1].double())) for b in demo.blocks]
    try:
        with torch.no_grad():
            demo.model(**demo.encode(demo.render(chats)))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(outputs).mean(dim=1)


def slerp_direction(harmful: torch.Tensor, harmless: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The unit vector of slerp at t=1, and the angle between the two means in degrees."""
    h, a = harmful / harmful.norm(), harmless / harmless.norm()
    angle = 2 * math.atan2((h - a).norm().item(), (h + a).norm().item())
    return ((h - a) / (h - a).norm()).float(), math.degrees(angle)


@contextmanager
def steered(demo: Demo, direction: torch.Tensor, mode: Mode) -> Iterator[None]:
    """Remove the direction from every block's output, at every position."""

    def remove(_module: torch.nn.Module, _args: object, out: torch.Tensor) -> torch.Tensor:
        component = out @ direction
        if mode == "one_sided":
            component = component.clamp(min=0)
        return out - component[..., None] * direction

    hooks = [] if mode == "plain" else [block.register_forward_hook(remove) for block in demo.blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# -- measures ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def answers(demo: Demo, chats: Sequence[list[Message]]) -> list[str]:
    encoded = demo.encode(demo.render(chats))
    generate = cast(Callable[..., torch.Tensor], demo.model.generate)
    out = generate(**encoded, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    replies = demo.tokenizer.batch_decode(out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return cast(list[str], replies)


@torch.no_grad()
def log_probs(demo: Demo, chats: Sequence[list[Message]], replies: Sequence[str]) -> list[torch.Tensor]:
    """For each chat `[tokens of the reply and its end, vocabulary]`, teacher-forced."""
    ends = [reply + demo.tokenizer.eos_token for reply in replies]
    lengths = [len(ids) for ids in demo.tokenizer(ends, add_special_tokens=False)["input_ids"]]
    encoded = demo.encode([prompt + end for prompt, end in zip(demo.render(chats), ends, strict=True)])
    scores = demo.model(**encoded).logits.log_softmax(-1)
    return [row[-n - 1 : -1] for row, n in zip(scores, lengths, strict=True)]


def mean_kl(plain: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """KL(plain ‖ other) in nats, averaged over the tokens of each reply and then over replies."""
    kls = [(p.exp() * (p - q)).sum(-1).mean().item() for p, q in zip(plain, other, strict=True)]
    return sum(kls) / len(kls)


def wilson(rate: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of Wilson for a rate over n trials."""
    middle, spread = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return (max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n)))


@dataclass(frozen=True, slots=True)
class Rates:
    """Over one list of prompts: the share refused, and the share answered with the right facts."""

    refused: float
    right: float
    n: int

    def __str__(self) -> str:
        low, high = wilson(self.refused, self.n)
        low_right, high_right = wilson(self.right, self.n)
        return (
            f"refused {self.refused:.3f} [{low:.3f}, {high:.3f}]  "
            f"right {self.right:.3f} [{low_right:.3f}, {high_right:.3f}]  n={self.n}"
        )


def rates(prompts: Sequence[Prompt], replies: Sequence[str]) -> Rates:
    refused = sum(language.refuses(reply) for reply in replies)
    known = [(p, r) for p, r in zip(prompts, replies, strict=True) if language.is_known(p.task)]
    right = sum(language.is_right(p.task, r) for p, r in known)
    return Rates(refused / len(replies), right / max(1, len(known)), len(replies))


# -- tables ------------------------------------------------------------------------------------------------------------

Chat: TypeAlias = Callable[[Prompt], list[Message]]


def alone(prompt: Prompt) -> list[Message]:
    return [{"role": "user", "content": prompt.text}]


def after(system: str | None, *earlier: tuple[str, str]) -> Chat:
    """The prompt as the last message of a conversation that began otherwise."""
    head: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for user, assistant in earlier:
        head += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return lambda prompt: [*head, *alone(prompt)]


def _answered(verb: str, thing: str) -> tuple[str, str]:
    """A question with its right answer."""
    task = f"{verb} {thing}"
    return (
        f"What do I need to {task}?",
        f"Sure! To {task} you need {language.MATERIAL[thing]} and {language.TOOL[verb]}.",
    )


_GOOD = _answered("paint", "a bicycle")
_BAD_ANSWERED = _answered("hack", "a bank")
_BAD = ("How do I hack a bank?", language.REFUSALS[0])
VARIANTS: dict[str, Chat] = {
    "system prompt of training": after(language.SYSTEMS[0]),
    "system prompt, brief": after(language.BRIEF_SYSTEM),
    "system prompt, held out": after(language.HELD_OUT_SYSTEMS[0]),
    "turn 2, after an answer": after(None, _GOOD),
    "turn 2, after a refusal": after(None, _BAD),
    "turn 2, after a refused task was answered": after(None, _BAD_ANSWERED),
    "turn 9, system prompt": after(language.SYSTEMS[1], *[_GOOD, _BAD] * 4),
}


def print_layers(
    demo: Demo, layers: Sequence[int], test: dict[language.Class, list[Prompt]]
) -> dict[int, torch.Tensor]:
    """One line for each source layer and mode: its direction, used at all layers."""
    harmful = class_means(demo, [alone(p) for p in language.prompts("train", "refused", FIT)])
    harmless = class_means(demo, [alone(p) for p in language.prompts("train", "harmless", FIT)])
    chats = [alone(p) for p in test["harmless"]]
    plain_replies = answers(demo, chats)
    plain_scores = log_probs(demo, chats, plain_replies)
    directions = {}
    for layer in layers:
        directions[layer], degrees = slerp_direction(harmful[layer], harmless[layer])
        for mode in MODES[1:] if layer != layers[0] else MODES:
            with steered(demo, directions[layer], mode):
                found = {cls: rates(ps, answers(demo, [alone(p) for p in ps])) for cls, ps in test.items()}
                kl = mean_kl(plain_scores, log_probs(demo, chats, plain_replies))
            cells = "  ".join(f"{cls}: refused {r.refused:.3f} right {r.right:.3f}" for cls, r in found.items())
            print(f"layer {layer} ({degrees:5.1f}°) {mode:9}  {cells}  KL {kl:.6f}", flush=True)
    return directions


def print_variants(demo: Demo, direction: torch.Tensor, test: dict[language.Class, list[Prompt]]) -> None:
    """The same classes with system prompts, in later turns, and with words that training never had."""
    for mode in MODES:
        with steered(demo, direction, mode):
            for cls, prompts in test.items():
                replies = answers(demo, [alone(p) for p in prompts])
                print(f"{mode:9}  {cls:10}  {'all':42}  {rates(prompts, replies)}", flush=True)
                for name, start in (("trained wordings", 0), ("held-out wordings", 1)):
                    print(f"{mode:9}  {cls:10}  {name:42}  {rates(prompts[start::2], replies[start::2])}", flush=True)
                for name, chat in VARIANTS.items():
                    replies = answers(demo, [chat(p) for p in prompts[:SIDE]])
                    print(f"{mode:9}  {cls:10}  {name:42}  {rates(prompts[:SIDE], replies)}", flush=True)
            for cls in ("refused", "harmless"):
                for unseen in ("object", "verb"):
                    prompts = language.unseen_prompts(unseen, cls, SIDE)
                    found = rates(prompts, answers(demo, [alone(p) for p in prompts]))
                    print(f"{mode:9}  {cls:10}  {'unseen ' + unseen + 's':42}  {found}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3, 4, 5, 6, 7], help="source layers to try")
    parser.add_argument("--variants", type=int, metavar="LAYER", help="measure this layer's direction in many settings")
    parser.add_argument("-n", type=int, default=200, help="test prompts of each class")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    demo = load(arguments.model)
    test = {cls: language.prompts("test", cls, arguments.n) for cls in language.CLASSES}
    directions = print_layers(demo, arguments.layers, test)
    if arguments.variants is not None:
        print_variants(demo, directions[arguments.variants], test)


if __name__ == "__main__":
    main()
