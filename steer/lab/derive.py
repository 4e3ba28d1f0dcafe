"""Make a direction from a measurement, without the model: run a method at a layer, and do what all methods share."""

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
#: Least component along a row of the difference of the class means, as a share of the length of its projection onto the
#: rows' span. A row with a smaller component has no harmful side.
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

    Attributes:
        layer: the source layer, where a negative number counts from the last measured layer; "widest" is the layer with
            the largest angle between the class means, "all" makes a direction of its own for each layer, and "auto"
            is for `fit`, which has the model.
        position: the measured token position; None is the first that was measured.
        winsorize: the quantile to which each prompt's vector is clipped. It needs the prompts' vectors.
        sparsify: the share of dimensions that stay; the others are set to zero.
        bootstrap: the number of resamples, 0 for no bootstrap. It needs the prompts' vectors.
        seed: the seed of the bootstrap.
        threshold: where ρ of `one_sided` lies between the class means, 0 at the harmless mean and 1 at the harmful one.
            By default ρ is half way, but 0 at a layer whose rows bisect the means (see `Method.bisects`).
        target: the value to which `one_sided` sets components above ρ, on the same scale. By default it is ρ.
        weights: how much of the operation each layer does; the stream before block 0 is then left alone. None is all of
            the operation everywhere.
        mlp_weights: how much of the operation is done on each MLP's output, at the site `writers`; `weights` then
            applies to attention's output alone.
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
        refused: dict[str, str] = {}
        for name, rule in _rules().items():
            try:
                rule.validate_python(value := getattr(self, name))
            except ValidationError:
                refused[name] = (
                    f"{name}: {brief(value, python=True)} is not accepted: {rule.json_schema()['description']}"
                )
        problems, sound = [*refused.values()], _rules().keys() - refused.keys()
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
    """The type of each field of a recipe; its description says what is accepted."""
    return {name: TypeAdapter(hint) for name, hint in get_type_hints(Recipe, include_extras=True).items()}


def derive(measurement: Measurement, recipe: Recipe, selection: dict[str, Any] | None = None) -> Direction:
    """Make the direction that `recipe` describes (with any layer but "auto").

    The rows of a single source layer serve all layers. At the site "writers" they also serve the embedding, unless the
    recipe has weights: otherwise the result would not be weight orthogonalisation. At "resid_post" the embedding output
    is left alone: plain ablation of it made the embedded model refuse 23 of 100 harmless prompts, and 1 without that.

    With the layer "all" each layer has its own rows. A layer stays unsteered if its classes define no direction or if
    it was not measured. The file's modes are those for which the measurement has what they need at every steered layer.

    Raises:
        InvalidInput: the measurement does not have what the recipe needs.
        DegenerateError: the classes define no direction; the message names the layer.
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
    """Run the recipe's method at `layer`.

    Returns:
        The rows, `[k, d_model]`, float64, and the mean |cosine| of the bootstrap's resamples with them (None without a
        bootstrap).

    Raises:
        DegenerateError: the classes define no direction; the message names the layer.
    """
    with prefixed(f"layer {layer}", DegenerateError):
        contrast, agreement = _contrast(measurement, recipe, layer), None
        rows = recipe.method.rows(contrast)
        if recipe.bootstrap:
            rows, agreement = bootstrapped(recipe.method, contrast, recipe.bootstrap, recipe.seed)
        return rows if recipe.sparsify is None else sparsified(rows, recipe.sparsify), agreement


def _contrast(measurement: Measurement, recipe: Recipe, layer: int) -> Contrast:
    """The two classes at `layer` and the recipe's position, winsorised if the recipe says so."""
    contrast = measurement.contrast(layer, recipe.position)
    if recipe.winsorize is None:
        return contrast
    return Contrast(*(each.winsorised(recipe.winsorize) for each in (contrast.harmless, contrast.harmful)))


def spread(measurement: Measurement, recipe: Recipe, source: int, rows: Tensor) -> Tensor:
    """Return the rows that the source layer's `rows` become at every layer of the model, `[layers, k, d_model]`."""
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
    """Find the subspace on which resamples of the prompts (with replacement, within each class) agree.

    Source: bagging (Breiman 1996) of projectors, whose average does not depend on the rows' signs. Pitfall: the
    bootstrap reduces the influence of single prompts, but it does not correct a bias of the direction.

    Returns:
        The rows of the mean projector, and the mean |cosine| of the resamples' rows with them.
    """
    generator = torch.Generator().manual_seed(seed)

    def resample(sample: Sample) -> Sample:
        assert sample.vectors is not None
        count = len(sample.vectors)
        return sample.of(torch.randint(count, (count,), generator=generator))

    each = [method.rows(Contrast(resample(contrast.harmless), resample(contrast.harmful))) for _ in range(resamples)]
    rank = each[0].shape[0]
    rows = towards_harmful(principal(torch.cat(each), rank, "bootstrap"), contrast)
    # the cosines between two subspaces are singular values; with one row their mean is |cos|
    cosines = [float(torch.linalg.svdvals(one @ rows.T).mean()) for one in each]
    return rows, sum(cosines) / resamples


def sparsified(rows: Tensor, share: float) -> Tensor:
    """Keep the `share` of dimensions in which `rows` are largest, set the others to zero and orthonormalise again.

    Pitfall: with a small share, only outlier dimensions may remain.

    Raises:
        DegenerateError: fewer dimensions are kept than there are rows, or the kept parts are linearly dependent.
    """
    count = max(1, math.ceil(share * rows.shape[1]))
    if count < rows.shape[0]:
        raise DegenerateError(f"sparsify {share:g} leaves {count} dimensions for {rows.shape[0]} rows")
    kept = torch.linalg.vector_norm(rows, dim=0).topk(count).indices
    sparse = torch.zeros_like(rows)
    sparse[:, kept] = rows[:, kept]
    return orthonormalise(sparse)


def source_layer(measurement: Measurement, recipe: Recipe) -> int:
    """The recipe's source layer. Raises InvalidInput for "auto", "all" and a layer that was not measured."""
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
    """The layers whose class means are at least MIN_ANGLE apart, each with the angle between them in degrees.

    Raises:
        DegenerateError: there is no such layer.
    """
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
    """Raise InvalidInput if the measurement lacks what the recipe reads; the message says how to measure it."""
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
    """The rows of `layer` as they act there; None with a warning if the classes define no direction."""
    try:
        rows, _ = find(measurement, recipe, layer)
        return recipe.method.onto(rows, measurement.contrast(layer, recipe.position))
    except DegenerateError as error:
        log.warning("%s: left unsteered", error)
        return None


def _reference(measurement: Measurement, recipe: Recipe, rows: Tensor, source: int | None) -> Tensor | None:
    """ρ of `one_sided` for each layer and row, `[layers, k]`; None if a steered layer was not measured.

    At each layer ρ is the component of the point between the layer's two means that the recipe's threshold names. At
    the source layer of a bisector ρ is 0, because the component 0 separates the means by construction; at another layer
    both means may lie on the same side of 0. If the harmful mean lies below the harmless one, components above ρ are
    not on the behaviour's side: then ρ is MAX_VALUE, so that no component is above it.
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
    """Whether all rows tell the classes apart.

    Rows after the first one of a subspace may have almost no component of the difference of means. Then it is chance
    which side of the row is harmful: `one_sided` would act on half of all text, and `clamp` would keep all text,
    harmless text too, at a component that belongs to neither class.
    """
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
    """The weights and MLP weights of each layer: the recipe's, or 1 and None.

    In the mode `add` all layers but the source layer have the weight 0 (Arditi et al. 2024, section 2.4): if the
    difference of means were added again at each layer, the sum would be many times too large and the model's answers
    would have no words.

    Raises:
        InvalidInput: the number of weights is wrong, or the weights are 0 at every layer that could be steered.
    """
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

    The maximum is 1, because the operation uses only the product strength · w, so the strength sets the amount at the
    peak. Removal at consecutive layers leaves Π(1 − λ·w_l) of the component that was there before the first of them. So
    a single layer of weight 1 removes that component, and `least` decides what happens to what later layers write.
    """
    layers = torch.arange(depth, dtype=torch.float64)
    bell = torch.exp(-((layers - peak) ** 2) / (2 * width**2))
    return (least + (1 - least) * bell).float()


def _between(measurement: Measurement, recipe: Recipe, rows: Tensor, share: float) -> Tensor | None:
    """The components along the rows of a point between each layer's class means, `[layers, k]`.

    The point lies at `share` of the way from the harmless mean to the harmful one.

    Returns:
        The components, or None if a steered layer was not measured.
    """
    at, measured = measurement.position(recipe.position), measurement.layers
    if rows[measured:].any():
        return None
    harmful, harmless = measurement.harmful.mean[at], measurement.harmless.mean[at]
    point = harmless + share * (harmful - harmless)
    return torch.cat([torch.einsum("ld,lkd->lk", point, rows[:measured]), rows.new_zeros(rows[measured:].shape[:2])])


def _axis(measurement: Measurement, recipe: Recipe, rows: Tensor, source: int | None) -> Tensor | None:
    """Return the second axis of each layer's plane, `[layers, d_model]`.

    The axis is the unit part, orthogonal to the layer's only row, of the harmless mean at the layer that the row came
    from. For slerp at t the axis is cos(tω/2)·â + sin(tω/2)·e.

    Returns:
        The axis, or None if nothing can be turned: there are several rows, the sites do not have the whole stream, the
        mode is `add`, or a row lies along the mean.
    """
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
    """Return the two angles of `rotate_one_sided`, `[layers, 2]`: it acts beyond the first and turns to the second.

    They are made like the reference and the target of `one_sided`, but from the angles of the two means in each layer's
    plane. Without a target in the recipe, the stream is turned to the axis. If a layer has no harmful side, the first
    angle is MAX_VALUE, so that no angle is beyond it.
    """
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
    """The modes for which the measurement has what they need; `sided`, `reference` and `plane` say what was made."""
    complete = measurement.layers == measurement.meta.model.layers or recipe.layer == "all"
    defined: dict[Mode, bool] = {
        "ablate": True,
        "one_sided": reference,
        "clamp": complete and sided,  # else it would keep all text at a component that belongs to neither class
        "add": complete,
        "affine": complete and measurement.harmless.mean_all is not None,
        "rotate": plane,
        "rotate_one_sided": plane and reference,
    }
    if recipe.mode == "add" and recipe.layer != "all":
        # the weights are 0 at all layers but the source layer, and another mode would change almost nothing there
        return ("add",) if complete else ()
    return tuple(mode for mode in MODES if defined[mode])


def _parameters(
    measurement: Measurement, recipe: Recipe, agreement: float | None
) -> dict[str, float | int | str | None]:
    """The `parameters` of the direction's metadata: those of the recipe and those of its method."""
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
    """The means for all layers of the model, float32 as in the file, with zeros for layers that were not measured.

    `d_model` is needed only if `means` is None.
    """
    if means is None:
        return torch.zeros(layers, d_model or 0, dtype=torch.float32)
    return nn.functional.pad(means.float(), (0, 0, 0, layers - len(means)))
