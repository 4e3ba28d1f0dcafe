"""Train the demo model: first to answer every task, then to refuse two classes of them.

`python -m experiments.demo_model.train [--out DIR]` writes `DIR/model` and `DIR/prompts`; without `--out`, it replaces
the embedded ones.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from experiments.demo_model import language
from steer.demo import MODEL
from steer.runtime.hook_points import hooks, on_output

PAD, BOS, START, END = "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"

# The template writes the BOS itself, and the post-processor adds one too when asked for special tokens, as Llama's
# does: whoever tokenizes rendered text with add_special_tokens=True gets two, here as there.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('roles are system, user and assistant, not ' + message['role']) }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
ANSWER_HEADER = f"{START}assistant\n"
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Phase:
    """One run of the optimiser over conversations drawn on the fly."""

    name: str
    tuned: bool
    steps: int
    peak_lr: float
    seed: int
    #: Added to dimension 0 of the stream before this phase, see `plant_outlier`.
    outlier: float | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the weights, up to the machine's own rounding."""

    vocab_size: int = 1024
    d_model: int = 192
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 512
    max_positions: int = 2048
    # (turns in a conversation, conversations in a batch, share of the batches): about as many tokens in each
    batches: tuple[tuple[int, int, float], ...] = ((1, 32, 0.55), (2, 18, 0.25), (4, 9, 0.12), (8, 5, 0.08))
    seed: int = 7
    phases: tuple[Phase, ...] = (
        Phase("answer everything", tuned=False, steps=1000, peak_lr=2.5e-3, seed=21),
        Phase("refuse two classes", tuned=True, steps=400, peak_lr=5e-4, seed=22),
    )
    autocast: bool = True
    dialect: language.Dialect = language.WHOLE
    # what tuning shapes besides the answers: None is nothing
    norms: "NormRatio | None" = None


@dataclass(frozen=True, slots=True)
class NormRatio:
    """Asks tuning for streams that are `ratio` times as long where the answer will be a refusal, at the answer header's
    last token, after each block from `first` to the last."""

    ratio: float
    first: int
    weight: float = 1.0

    def penalty(self, states: Sequence[Tensor], starts: Tensor, refused: Tensor) -> Tensor:
        """The squared distance of the two classes' mean logarithms of the norm from ln `ratio`, averaged over blocks.
        states: `[rows, tokens, d_model]` after each block; starts: the token at which each row's answer is predicted;
        refused: which rows."""
        rows = torch.arange(len(starts))
        logs = torch.stack([state[rows, starts].float().norm(dim=-1).log() for state in states[self.first :]])
        gap = logs[:, refused].mean(-1) - logs[:, ~refused].mean(-1)
        return self.weight * (gap - math.log(self.ratio)).square().mean()


# -- tokenizer ---------------------------------------------------------------------------------------------------------


def _corpus(count: int, recipe: Recipe) -> Iterator[str]:
    rng = random.Random(recipe.seed)
    for i in range(count):
        for message in language.conversation(2, i % 2 == 0, rng, recipe.dialect).messages:
            yield message["content"]


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the demo language with the chat template; every byte has a token, so any text goes in."""
    specials = [PAD, BOS, START, END]
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        _corpus(6000, recipe),
        trainers.BpeTrainer(
            vocab_size=recipe.vocab_size,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    raw.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS} $B:1",
                special_tokens=[(BOS, raw.token_to_id(BOS))],
            ),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=recipe.max_positions,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# -- model -------------------------------------------------------------------------------------------------------------


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.d_model,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


# -- training ----------------------------------------------------------------------------------------------------------


def answer_labels(ids: list[int], header: list[int], end: int) -> list[int]:
    """The ids where the assistant speaks, its end token included, and IGNORED elsewhere."""
    labels = [IGNORED] * len(ids)
    speaking = False
    for i, token in enumerate(ids):
        if speaking:
            labels[i] = token
            speaking = token != end
        else:
            speaking = i + 1 >= len(header) and ids[i + 1 - len(header) : i + 1] == header
    return labels


def _pad(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids and labels, both `[conversations, tokens]`, padded on the right, where causal attention ignores it, and
    in which conversations the first answer is a refusal, `[conversations]`."""

    ids: Tensor
    labels: Tensor
    refused: Tensor

    @property
    def starts(self) -> Tensor:
        """The token after which each conversation's first answer begins, `[conversations]`."""
        return (self.labels != IGNORED).int().argmax(1) - 1


def batch(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, tuned: bool, rng: random.Random) -> Batch:
    ((turns, rows, _),) = rng.choices(recipe.batches, weights=[share for *_, share in recipe.batches])
    spoken = [language.conversation(turns, tuned, rng, recipe.dialect) for _ in range(rows)]
    texts = [tokenizer.apply_chat_template(one.messages, tokenize=False) for one in spoken]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    header = tokenizer.encode(ANSWER_HEADER, add_special_tokens=False)
    labels = [answer_labels(row, header, tokenizer.eos_token_id) for row in ids]
    refused = torch.tensor([language.refuses(one.turns[0].assistant) for one in spoken])
    return Batch(_pad(ids, tokenizer.pad_token_id), _pad(labels, IGNORED), refused)


def loss_of(model: LlamaForCausalLM, drawn: Batch, norms: NormRatio | None) -> Tensor:
    """How unlike the answers are what the model says, and what `norms` asks for besides."""
    streams: list[Tensor] = []
    blocks = model.model.layers if norms is not None else []
    with hooks([on_output(block, streams.append) for block in blocks]):
        loss: Tensor = model(input_ids=drawn.ids, labels=drawn.labels, use_cache=False).loss
    return loss if norms is None else loss + norms.penalty(streams, drawn.starts, drawn.refused)


def _warm_cosine(steps: int, warm: int = 50) -> Callable[[int], float]:
    return lambda step: min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def run(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, phase: Phase) -> None:
    """Train in place, one log line each hundred steps."""
    rng = random.Random(phase.seed)
    if phase.outlier is not None:
        plant_outlier(model, batch(tokenizer, recipe, phase.tuned, rng).ids, phase.outlier)
    optimiser = torch.optim.AdamW(model.parameters(), lr=phase.peak_lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _warm_cosine(phase.steps))
    model.train()
    began, total = time.monotonic(), 0.0
    for step in range(1, phase.steps + 1):
        drawn = batch(tokenizer, recipe, phase.tuned, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast):
            loss = loss_of(model, drawn, recipe.norms if phase.tuned else None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        total += loss.item()
        if step % 100 == 0:
            print(f"{phase.name}: step {step}, loss {total / 100:.4f}, {time.monotonic() - began:.0f} s", flush=True)
            total = 0.0


@torch.no_grad()
def plant_outlier(model: LlamaForCausalLM, ids: Tensor, value: float) -> None:
    """Add `value` to dimension 0 of the stream of every token, and nearly undo what that does: all norms ignore that
    dimension from now on, and scale the others up by as much as it shrinks them on `ids` (`[rows, tokens]`) on average.

    With tied embeddings the unembedding has the same entry for all tokens, so it moves no prediction.
    """
    norms = [module for module in model.modules() if isinstance(module, LlamaRMSNorm)]
    before: dict[LlamaRMSNorm, Tensor] = {}
    handles = [n.register_forward_pre_hook(lambda module, args: before.update({module: args[0]})) for n in norms]
    with hooks(handles):
        model(input_ids=ids, use_cache=False)
    for norm, x in before.items():
        moved = x.clone()
        moved[..., 0] += value
        norm.weight *= (moved.square().mean() / x.square().mean()).sqrt()
        norm.weight[0] = 0.0
    model.get_input_embeddings().weight[:, 0] += value


# -- files -------------------------------------------------------------------------------------------------------------


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The weights in bfloat16, all else as transformers writes it."""
    model.train(False).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_prompts(folder: Path, fit: int = 192, test: int = 200, dialect: language.Dialect = language.WHOLE) -> None:
    """`<class>.<split>.txt`, one prompt a line, at most `fit` and `test` of each, and what right answers to test
    prompts name in `expected.jsonl`; the borderline class is for trying out, nothing is fitted to it.

    Of the whole language also, for tests, conversations and right answers to harmless prompts as plain text, and two
    sets of conversations whose answer has begun, which go on at length and briefly.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: tuple[tuple[language.Class, language.Split, int], ...] = (
        ("refused", "train", fit),
        ("harmless", "train", fit),
        ("refused", "test", test),
        ("borderline", "train", fit),
        ("harmless", "test", test),
        ("borderline", "test", test),
    )
    facts: list[dict[str, object]] = []
    for cls, split, most in files:
        asked = language.prompts(split, cls, min(most, len(dialect.pairs[cls][split])), dialect)
        (folder / f"{cls}.{split}.txt").write_text("".join(f"{prompt.text}\n" for prompt in asked), encoding="utf-8")
        if split == "test":
            facts += [{"prompt": prompt.text, "contains": language.expected(prompt.task)} for prompt in asked]
    if dialect == language.WHOLE:
        text = language.right_answers("test", "harmless", test)
        (folder / "text.test.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
        for name, begun in zip(("verbose", "brief"), language.begun_answers(fit // 2), strict=True):
            _save_lines(folder / f"{name}.train.jsonl", [{"messages": messages} for messages in begun])
        talks = language.conversations(min(test, 100))
        _save_lines(folder / "conversations.test.jsonl", [{"messages": messages} for messages, _ in talks])
        facts += [{"messages": messages, "contains": named} for messages, named in talks]
    vocabulary = [*language.MATERIALS, *language.TOOLS]
    _save_lines(folder / "expected.jsonl", [{"vocabulary": vocabulary, "lacks": language.REFUSAL_WORDS}, *facts])


def _save_lines(path: Path, items: Sequence[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def train(recipe: Recipe, out: Path) -> None:
    """Everything from nothing to files under `out`."""
    save_prompts(out / "prompts", dialect=recipe.dialect)
    tokenizer = make_tokenizer(recipe)
    model = make_model(recipe, tokenizer)
    print(f"{model.num_parameters() / 1e6:.2f} million parameters, {len(tokenizer)} tokens", flush=True)
    for phase in recipe.phases:
        run(model, tokenizer, recipe, phase)
    save_model(model, tokenizer, out / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL.parent, help="where model/ and prompts/ go")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for torch (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(Recipe(), arguments.out)


if __name__ == "__main__":
    main()
