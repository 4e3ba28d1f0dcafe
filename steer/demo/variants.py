"""Small models that differ in one property each."""

from __future__ import annotations

from dataclasses import replace
from steer.demo.language import Dialect, REFUSALS
from steer.demo import words
from steer.demo.train import Recipe, Phase, NormRatio

DIALECT = Dialect(
    harmless_verbs=words.HARMLESS_VERBS[:12],
    refused_verbs=words.REFUSED_VERBS[:12],
    harmless_objects=words.HARMLESS_OBJECTS[:12],
    refused_objects=words.REFUSED_OBJECTS[:12],
    borderline_objects=words.BORDERLINE_OBJECTS[:12],
    kinds=("howto",),
    systems=(),
    brief=True,
    small_talk=0.0,
    object_questions=0.15,
)

SMALL = Recipe(
    vocab_size=512, d_model=64, layers=6, heads=4, kv_heads=4, head_dim=16, mlp=192, max_positions=256,
    batches=((1, 48, 1.0),), dialect=DIALECT, autocast=False,
    phases=(
        Phase("answer everything", tuned=False, steps=600, peak_lr=5e-3, seed=21),
        Phase("refuse two classes", tuned=True, steps=200, peak_lr=1e-3, seed=22),
    ),
)
