"""From a measurement to a direction, without the model: the method at a layer, and what is done around any method."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from steer.direction import MAX_VALUE, Direction, DirectionMeta
from steer.errors import DegenerateError, InvalidInput, brief, prefixed
from steer.geometry import MIN_ANGLE, angle, orthogonal_part, orthonormalise
from steer.lab.measurement import Contrast, Measurement, Sample, principal, towards_harmful
from steer.lab.methods import METHODS
from steer.lab.methods.base import Method
from steer.lab.methods.means import Slerp
from steer.names import MAX_STRENGTH, MODES, SITES, TURNING, Mode, Site, acts_on_terms

log = logging.getLogger("steer")
#: The least part of the difference of means within the rows' span that a row must have to have a side.
LEAST_SHARE = 0.2


_WITHIN = f"a number within ±{MAX_STRENGTH:g}"
_Whole = Annotated[int, Field(strict=True)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Bounded = Annotated[_Number, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]
_Share = Annotated[Annotated[_Number, Field(gt=0, le=1)] | None, Field(description="a number above 0 and at most 1")]
_Weights = Annotated[
    Sequence[_Number] | None, Field(description="a list of finite numbers, one for each layer of the model")
]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a direction is made from a measurement.

    layer: the source layer (negative from the last measured one), "widest" for the one whose class means are the
    widest apart, "all" for each layer's own; "auto" is for `fit`, which has the model. position: None is the first that
    was measured. winsorize and bootstrap read the prompts' vectors; sparsify is the share of dimensions that stay.
    threshold and target: where ρ of `one_sided` stands between the means, and where it sets what is above ρ, 0 at the
    harmless one and 1 at the harmful one. Without a threshold ρ is half way, and at a layer whose rows bisect the means
    (see `Method.bisects`) the bisector; without a target it is ρ. weights: how much of the operation each layer does,
    and the stream before block 0 nothing of it; None for all of it everywhere. mlp_weights: the same of what MLPs
    write, at the site `writers`; `weights` is then of what attention writes.
    """

    method: Annotated[
        Method, Field(description=f"a method, which make_method makes of one of the names {', '.join(METHODS)}")
    ] = field(default_factory=Slerp)
    layer: Annotated[
        _Whole | Literal["auto", "widest", "all"],
        Field(description="a whole number, or one of 'auto', 'widest', 'all'"),
    ] = "auto"
    position: Annotated[_Whole | None, Field(description="a whole number")] = None
    winsorize: _Share = None
    sparsify: _Share = None
    bootstrap: Annotated[_Whole, Field(ge=0, description="a whole number: 0, or at least 2 resamples")] = 0
    seed: Annotated[_Whole, Field(ge=0, lt=2**63, description="a whole number from 0 to 2^63 − 1")] = 0
    mode: Annotated[Mode, Field(description=f"one of {', '.join(map(repr, MODES))}")] = "ablate"
    strength: Annotated[_Bounded, Field(description=_WITHIN)] = 1.0
    sites: Annotated[
        Sequence[Site], Field(min_length=1, description=f"a list of some of {', '.join(map(repr, SITES))}")
    ] = ("resid_post",)
    threshold: Annotated[_Bounded | None, Field(description=_WITHIN)] = None
    target: Annotated[_Bounded | None, Field(description=_WITHIN)] = None
    weights: _Weights = None
    mlp_weights: _Weights = None

    def __post_init__(self) -> None:
        wrong: dict[str, str] = {}
        for name, rule in _rules().items():
            try:
                rule.validate_python(value := getattr(self, name))
            except ValidationError:
                wrong[name] = (
                    f"{name}: {brief(value, python=True)} is not accepted: {rule.json_schema()['description']}"
                )
        problems, sound = [*wrong.values()], _rules().keys() - wrong.keys()
        threshold = 0.5 if self.threshold is None else self.threshold
        if self.target is not None and sound >= {"target", "threshold"} and self.target > threshold:
            problems.append(f"target must not be above the threshold, got {self.target:g}")
        if self.mlp_weights is not None and sound >= {"mlp_weights", "sites"} and not acts_on_terms(self.sites):
            problems.append(f"mlp_weights needs the site 'writers', got {', '.join(self.sites)}")
        if "bootstrap" in sound and self.bootstrap == 1:
            problems.append("bootstrap must be 0, or at least 2 resamples, got 1")
        InvalidInput.raise_for(problems)


@cache
def _rules() -> dict[str, TypeAdapter[object]]:
    """What each field of a recipe may be, which its description says."""
    return {name: TypeAdapter(hint) for name, hint in get_type_hints(Recipe, include_extras=True).items()}


def derive(measurement: Measurement, recipe: Recipe, selection: dict[str, Any] | None = None) -> Direction:
    """The direction that `recipe` makes (with any layer but "auto").

    With one source layer its rows serve all layers, and at the site "writers" the embedding too, without which that is
    no weight orthogonalisation. At "resid_post" the embedding output is left alone: on the embedded model plain
    ablation there took 23 of 100 harmless prompts to a refusal, and 1 without it. With "all" each layer has its own,
    and layers whose classes define none, or were not measured, are left unsteered. The file's modes are those for
    which the measurement has what they need at every steered layer. Raises DegenerateError naming the layer where
    nothing is defined.
    """
    facts, d_model = measurement.meta.model, measurement.meta.model.d_model
    check_needs(measurement, recipe)
    source: int | None = None
    embedding: Tensor | None = None
    agreement: float | None = None
    if recipe.layer == "all":
        each = [_found_or_none(measurement, recipe, layer) for layer in range(measurement.layers)]
        ranks = {len(own) for own in each if own is not None}
        if not ranks:
            raise DegenerateError("the two classes define a direction at no layer")
        nothing = torch.zeros(ranks.pop(), d_model, dtype=torch.float64)
        rows = torch.stack([nothing if own is None else own for own in each])
        rows = torch.cat([rows, nothing.expand(facts.layers - measurement.layers, *nothing.shape)])
        if measurement.layers < facts.layers:
            last = facts.layers - 1
            log.warning("layers %d to %d were not measured and stay unsteered", measurement.layers, last)
    else:
        source = source_layer(measurement, recipe)
        found, agreement = find(measurement, recipe, source)
        rows = spread(measurement, recipe, source, found)
        if acts_on_terms(recipe.sites) and recipe.weights is None and recipe.mlp_weights is None:
            embedding = found.float()
    sided = _sided(measurement, recipe, rows, source)
    reference = _reference(measurement, recipe, rows, source) if sided else None
    target = None if recipe.target is None else _between(measurement, recipe, rows, recipe.target)
    axis = _axis(measurement, recipe, rows, source)
    angles = None if axis is None else _angles(measurement, recipe, rows, axis)
    meta = DirectionMeta(
        schema_version=1 if axis is None else 2,
        method=recipe.method.name,
        parameters=_parameters(measurement, recipe, agreement),
        source_layer=source,
        selection=selection or {},
        **facts.as_fitted,
        **asdict(measurement.meta.rendering),
        bos_count=measurement.meta.bos_count,
        harmful=measurement.meta.harmful,
        harmless=measurement.meta.harmless,
        mode=recipe.mode,
        modes=_modes(measurement, recipe, sided, reference is not None, axis is not None),
        strength=recipe.strength,
        sites=recipe.sites,
    )
    if recipe.mode not in meta.modes:
        missing_one = (
            f"class means that this measurement does not have at every layer (measured: {measurement.layers} of "
            f"{facts.layers})"
        )
        if recipe.mode in TURNING and axis is None:
            missing_one = "one row for each layer, not along the harmless mean, at the site 'resid_post'"
        elif recipe.mode in ("one_sided", "clamp") and measurement.layers == facts.layers:
            missing_one = "a harmful side of each row, and a row of this direction hardly tells the classes apart"
        raise InvalidInput(f"the mode '{recipe.mode}' needs {missing_one}; with it: {', '.join(meta.modes)}")
    at = measurement.position(recipe.position)
    weights, mlp_weights = _weights(recipe, source, rows)
    return Direction(
        meta,
        directions=rows.float().contiguous(),
        weights=weights,
        mlp_weights=mlp_weights,
        reference=torch.zeros(rows.shape[:2], dtype=torch.float32)
        if reference is None
        else reference.float().contiguous(),
        mean_harmful=_whole(measurement.harmful.mean[at], facts.layers),
        mean_harmless=_whole(measurement.harmless.mean[at], facts.layers),
        mean_harmless_all=_whole(measurement.harmless.mean_all, facts.layers, d_model),
        embedding=embedding,
        target=None if target is None or reference is None else torch.minimum(target, reference).float().contiguous(),
        axis=None if axis is None else axis.float().contiguous(),
        angles=None if angles is None else angles.float().contiguous(),
    )


def find(measurement: Measurement, recipe: Recipe, layer: int) -> tuple[Tensor, float | None]:
    """The rows that the recipe's method finds at `layer`, `[k, d_model]`, float64; with a bootstrap the mean |cosine|
    of its resamples with them. Raises DegenerateError naming the layer."""
    with prefixed(f"layer {layer}", DegenerateError):
        contrast, agreement = _contrast(measurement, recipe, layer), None
        rows = recipe.method.rows(contrast)
        if recipe.bootstrap:
            rows, agreement = bootstrapped(recipe.method, contrast, recipe.bootstrap, recipe.seed)
        return rows if recipe.sparsify is None else sparsified(rows, recipe.sparsify), agreement


def _contrast(measurement: Measurement, recipe: Recipe, layer: int) -> Contrast:
    """The two classes as the recipe reads them."""
    contrast = measurement.contrast(layer, recipe.position)
    if recipe.winsorize is None:
        return contrast
    return Contrast(*(each.winsorised(recipe.winsorize) for each in (contrast.harmless, contrast.harmful)))


def spread(measurement: Measurement, recipe: Recipe, source: int, rows: Tensor) -> Tensor:
    """Return the source layer's rows as they act at every layer of the model, `[layers, k, d_model]`."""
    layers = measurement.meta.model.layers
    if not recipe.method.varies:
        return rows.expand(layers, *rows.shape)
    if measurement.layers < layers:
        raise InvalidInput(
            f"the method '{recipe.method.name}' needs the harmless mean of every layer where it acts; "
            f"{measurement.layers} of {layers} were measured"
        )
    each = []
    for layer in range(layers):
        with prefixed(f"layer {layer}", DegenerateError):
            each.append(recipe.method.onto(rows, measurement.contrast(layer, recipe.position)))
    return torch.stack(each)


def bootstrapped(method: Method, contrast: Contrast, resamples: int, seed: int) -> tuple[Tensor, float]:
    """The rows of the mean projector over resamples of the prompts (with replacement, within each class): the subspace
    on which they agree, and how much they do. Source: bagging (Breiman 1996) of projectors, which have no sign to agree
    on.

    Pitfall: it steadies what few prompts decide, and a direction that is biased stays so.
    """
    generator = torch.Generator().manual_seed(seed)

    def resample(sample: Sample) -> Sample:
        assert sample.vectors is not None
        count = len(sample.vectors)
        return sample.of(torch.randint(count, (count,), generator=generator))

    each = [method.rows(Contrast(resample(contrast.harmless), resample(contrast.harmful))) for _ in range(resamples)]
    rank = each[0].shape[0]
    rows = towards_harmful(principal(torch.cat(each), rank, "bootstrap"), contrast)
    # the cosines between two subspaces are singular values; their mean is |cos| where there is one row
    cosines = [float(torch.linalg.svdvals(one @ rows.T).mean()) for one in each]
    return rows, sum(cosines) / resamples


def sparsified(rows: Tensor, share: float) -> Tensor:
    """The `share` of dimensions that carry most of the rows, the others set to zero, orthonormal again.

    Pitfall: with a small share an outlier dimension is what remains.
    """
    count = max(1, math.ceil(share * rows.shape[1]))
    if count < rows.shape[0]:
        raise DegenerateError(f"sparsify {share:g} leaves {count} dimensions for {rows.shape[0]} rows")
    kept = torch.linalg.vector_norm(rows, dim=0).topk(count).indices
    sparse = torch.zeros_like(rows)
    sparse[:, kept] = rows[:, kept]
    return orthonormalise(sparse)


def source_layer(measurement: Measurement, recipe: Recipe) -> int:
    if recipe.layer == "widest":
        return max(separated(measurement, recipe), key=lambda pair: pair[1])[0]
    if isinstance(recipe.layer, str):
        raise InvalidInput(
            f"layer '{recipe.layer}' needs the model, which `steer fit` loads; accepted: a number, widest, all"
        )
    if not -measurement.layers <= recipe.layer < measurement.layers:
        raise InvalidInput(
            f"layer {recipe.layer} does not exist: this measurement has the layers 0 to {measurement.layers - 1}"
        )
    return recipe.layer % measurement.layers


def separated(measurement: Measurement, recipe: Recipe) -> list[tuple[int, float]]:
    """The layers whose class means are at least MIN_ANGLE apart, each with that angle in degrees."""
    found, least = [], math.degrees(MIN_ANGLE)
    for layer in range(measurement.layers):
        contrast = measurement.contrast(layer, recipe.position)
        try:
            degrees = math.degrees(float(angle(contrast.harmless.mean, contrast.harmful.mean)))
        except DegenerateError:
            continue
        if degrees >= least:
            found.append((layer, degrees))
    if not found:
        raise DegenerateError(
            f"at no layer are the class means at least {least:g}° apart: this model does not separate these sets"
        )
    return found


def check_needs(measurement: Measurement, recipe: Recipe) -> None:
    """Raise InvalidInput where the measurement does not hold what the recipe reads, with what would give it."""
    method, problems = recipe.method, []
    both = (measurement.harmful, measurement.harmless)
    vectors, moments = (all(getattr(s, kind) is not None for s in both) for kind in ("vectors", "moments"))
    if method.needs == "vectors" and not vectors:
        problems.append(f"the method '{method.name}' needs the prompts' vectors: measure with --vectors")
    if method.needs == "spread" and not (vectors or moments):
        problems.append(f"the method '{method.name}' needs the prompts' spread: measure with --vectors or --moments")
    for name, given in (("winsorize", recipe.winsorize is not None), ("bootstrap", recipe.bootstrap > 0)):
        if given and not vectors:
            problems.append(f"{name} needs the prompts' vectors: measure with --vectors")
    if recipe.winsorize is not None and measurement.meta.winsorize is not None:
        problems.append(f"winsorize: it was already done at the quantile {measurement.meta.winsorize} when measuring")
    for dataset in (measurement.meta.harmful, measurement.meta.harmless):
        if dataset is not None and dataset.count < method.prompts:
            problems.append(
                f"the method '{method.name}' needs at least {method.prompts} prompts of each class, {dataset.name} has "
                f"{dataset.count}"
            )
    InvalidInput.raise_for(problems)


def _found_or_none(measurement: Measurement, recipe: Recipe, layer: int) -> Tensor | None:
    try:
        rows, _ = find(measurement, recipe, layer)
        return recipe.method.onto(rows, measurement.contrast(layer, recipe.position))
    except DegenerateError as error:
        log.warning("%s: left unsteered", error)
        return None


def _reference(measurement: Measurement, recipe: Recipe, rows: Tensor, source: int | None) -> Tensor | None:
    """ρ of `one_sided` for each layer and row, `[layers, k]`; None where a steered layer has none.

    At each layer it is the component of the point between that layer's two means which the recipe's threshold says. A
    bisector separates the means by construction where it was made, and there ρ is 0; at another layer both means may
    lie on one side of it. Where the harmful mean lies below the harmless one, what is above ρ is not the behaviour's
    side: it is so large there that nothing is.
    """
    found = _between(measurement, recipe, rows, 0.5 if recipe.threshold is None else recipe.threshold)
    changed = recipe.sparsify or recipe.bootstrap or recipe.winsorize or recipe.threshold is not None
    if found is not None and recipe.method.bisects and not changed:
        found[slice(None) if source is None else source] = 0
    ends = [_between(measurement, recipe, rows, share) for share in (0.0, 1.0)]
    if found is None or ends[0] is None or ends[1] is None:
        return None
    return torch.where(ends[1] < ends[0], MAX_VALUE, found)


def _sided(measurement: Measurement, recipe: Recipe, rows: Tensor, source: int | None) -> bool:
    """Do all rows tell the classes apart? The rows of a subspace after its first may carry next to nothing of the
    difference of means: which side of them is harmful is chance, and `one_sided` would act on half of all text, and
    `clamp` would hold all of it, harmless text too, at a number that is of neither class."""
    if rows.shape[1] == 1:
        return True
    at, layers = measurement.position(recipe.position), range(measurement.layers) if source is None else [source]
    difference = measurement.harmful.mean[at] - measurement.harmless.mean[at]
    for layer in layers:
        components = (rows[layer] @ difference[layer]).abs()
        if rows[layer].any() and float(components.min()) < LEAST_SHARE * float(torch.linalg.vector_norm(components)):
            return False
    return True


def _weights(recipe: Recipe, source: int | None, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """The recipe's, or 1; for the mode `add` at the source layer alone (Arditi et al. 2024, section 2.4): to add the
    difference of means again at each layer is many times as much, and leaves no words."""
    layers = len(rows)
    for name in ("weights", "mlp_weights"):
        if (given := getattr(recipe, name)) is not None and len(given) != layers:
            raise InvalidInput(f"{name}: {len(given)} numbers for a model of {layers} layers; accepted: {layers}")
    weights = (
        torch.ones(layers, dtype=torch.float32)
        if recipe.weights is None
        else torch.tensor(recipe.weights, dtype=torch.float32)
    )
    mlp_weights = None if recipe.mlp_weights is None else torch.tensor(recipe.mlp_weights, dtype=torch.float32)
    if recipe.mode == "add" and source is not None:
        weights[torch.arange(layers) != source] = 0
    acting = torch.stack([weights, weights if mlp_weights is None else mlp_weights])
    if not acting[:, rows.flatten(1).any(1)].any():
        where = "at the source layer of a direction to add" if recipe.mode == "add" else "at every layer with rows"
        raise InvalidInput(f"weights: they are 0 {where}, so nothing would be steered")
    return weights, mlp_weights


def layer_weights(depth: int, peak: float, width: float, least: float) -> Tensor:
    """Weights `[depth]` between `least` and 1, float32: a bell around the layer `peak` on a floor,

        w(l) = least + (1 − least)·exp(−(l − peak)² / 2·width²).

    Its maximum is 1, since the operation knows only the product strength · w: how much at the peak is the strength's to
    say. Removal at layers one after the other leaves Π(1 − λ·w_l) of what stood before the first of them, so that one
    full layer is enough for that, and `least` decides about what layers write after it.
    """
    layers = torch.arange(depth, dtype=torch.float64)
    bell = torch.exp(-((layers - peak) ** 2) / (2 * width**2))
    return (least + (1 - least) * bell).float()


def _between(measurement: Measurement, recipe: Recipe, rows: Tensor, share: float) -> Tensor | None:
    """The component along the rows, `[layers, k]`, of the point at `share` of the way from each layer's harmless mean
    to its harmful one; None where a steered layer was not measured."""
    at, measured = measurement.position(recipe.position), measurement.layers
    if rows[measured:].any():
        return None
    harmful, harmless = measurement.harmful.mean[at], measurement.harmless.mean[at]
    point = harmless + share * (harmful - harmless)
    return torch.cat([torch.einsum("ld,lkd->lk", point, rows[:measured]), rows.new_zeros(rows[measured:].shape[:2])])


def _axis(measurement: Measurement, recipe: Recipe, rows: Tensor, source: int | None) -> Tensor | None:
    """Return the second axis of each layer's plane, `[layers, d_model]`: the unit part of the harmless mean orthogonal
    to the layer's one row, at the layer that the row came from. For slerp at t that is cos(tω/2)·â + sin(tω/2)·e. None
    where nothing can be turned: several rows, sites that do not have the whole stream, and rows along the mean."""
    if rows.shape[1] > 1 or acts_on_terms(recipe.sites) or recipe.mode == "add":
        return None
    axis, made = torch.zeros_like(rows[:, 0]), {}
    for layer, row in enumerate(rows[:, 0]):
        if not row.any():
            continue
        at = layer if source is None or recipe.method.varies else source
        if at not in made:
            try:
                made[at] = orthogonal_part(row, _contrast(measurement, recipe, at).harmless.mean)
            except DegenerateError:
                return None
        axis[layer] = made[at]
    return axis


def _angles(measurement: Measurement, recipe: Recipe, rows: Tensor, axis: Tensor) -> Tensor:
    """Return the two angles of `rotate_one_sided`, `[layers, 2]`: beyond which it acts, and to which it turns. They are
    made as the reference and the target of `one_sided`, from the angles of the two means in each layer's plane. Without
    a target it turns to the axis. Where there is no harmful side, nothing is beyond."""
    plane = torch.stack([axis, rows[:, 0]], 1)
    first, last = (_between(measurement, recipe, plane, share) for share in (0.0, 1.0))
    if first is None or last is None:
        return torch.tensor([MAX_VALUE, 0.0], dtype=axis.dtype).repeat(len(axis), 1)
    harmless, harmful = (torch.atan2(end[:, 1], end[:, 0]) for end in (first, last))
    apart = torch.remainder(harmful - harmless + torch.pi, 2 * torch.pi) - torch.pi  # the shorter way round
    gate = harmless + (0.5 if recipe.threshold is None else recipe.threshold) * apart
    gate = torch.where(apart < 0, MAX_VALUE, gate)
    target = torch.zeros_like(gate) if recipe.target is None else harmless + recipe.target * apart
    return torch.stack([gate, torch.minimum(target, gate)], 1)


def _modes(measurement: Measurement, recipe: Recipe, sided: bool, reference: bool, plane: bool) -> tuple[Mode, ...]:
    complete = measurement.layers == measurement.meta.model.layers or recipe.layer == "all"
    defined: dict[Mode, bool] = {
        "ablate": True,
        "one_sided": reference,
        "clamp": complete and sided,  # else it holds all text at a component that is of neither class
        "add": complete,
        "affine": complete and measurement.harmless.mean_all is not None,
        "rotate": plane,
        "rotate_one_sided": plane and reference,
    }
    if recipe.mode == "add" and recipe.layer != "all":
        # its weights are 0 but at the source layer, where another mode would do next to nothing
        return ("add",) if complete else ()
    return tuple(mode for mode in MODES if defined[mode])


def _parameters(
    measurement: Measurement, recipe: Recipe, agreement: float | None
) -> dict[str, float | int | str | None]:
    around: dict[str, float | int | str | None] = {
        "position": measurement.meta.positions[measurement.position(recipe.position)],
        "winsorize": recipe.winsorize or measurement.meta.winsorize,
    }
    around |= {k: v for k in ("sparsify", "threshold", "target") if (v := getattr(recipe, k)) is not None}
    if recipe.bootstrap:
        around |= {"bootstrap": recipe.bootstrap, "seed": recipe.seed}
        if agreement is not None:
            around["bootstrap_cosine"] = agreement
    return around | recipe.method.model_dump()


def _whole(means: Tensor | None, layers: int, d_model: int | None = None) -> Tensor:
    """Means of the measured layers as the file has them: float32, zeros where nothing was measured."""
    if means is None:
        return torch.zeros(layers, d_model or 0, dtype=torch.float32)
    return nn.functional.pad(means.float(), (0, 0, 0, layers - len(means)))
