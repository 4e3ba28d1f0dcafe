"""The app of the command `steer`, with all its commands. `serve` and `inspect` are defined here."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.markup import escape
from typer.core import TyperCommand

from steer._version import __version__
from steer.cli import admin, check, evaluate, export, fit, search
from steer.cli.console import echo_json, log_warnings, quiet_libraries, reported
from steer.cli.options import (
    VLLM_OPTIONS,
    check_model,
    expanded,
    find_vllm_model,
    nearest_option,
    unknown_options,
)
from steer.errors import InvalidInput, problem_text
from steer.lab.tables import shown, terminal_width, wrapped
from steer.settings import ServeSettings, check_directions_folder, served_name
from steer.spec import Condition


class _Command(TyperCommand):
    """A command whose texts are shown as they are: the brackets in `hub:NAME[/CONFIG]` are no markup."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.rich_markup_mode == "rich":
            self.help = self.help and escape(self.help)
            for each in self.params:
                each.help = each.help and escape(each.help)  # type: ignore[attr-defined]  # typer's parameters have a help

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments. The error for a missing option names a mistyped one."""
        given = list(args)  # a copy, since the parser consumes its list
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if isinstance(error.__cause__, ValidationError):  # of a flag in the environment
                error.message = problem_text(error.__cause__.errors(include_url=False)[0])
            if not error.message and not {"vllm", "--backend=vllm"}.intersection(given):  # missing; no options of vLLM
                near = ((one, nearest_option(ctx, one)) for one in given if one.startswith("--"))
                error.message = next((f"{one}: not an option of this command{end}" for one, end in near if end), "")
            raise


app = typer.Typer(
    help="Serve a language model plain or with a behaviour direction removed, switched per request.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120},
    rich_markup_mode="rich" if shutil.get_terminal_size().columns >= 100 else None,  # the columns of rich need room
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"steer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand != "serve":  # `serve` has an option for the log level
        log_warnings()


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
    if model is not None and model.startswith("-"):  # an unknown option came first and was read as MODEL
        options.insert(0, model)
        model = None
    check_model(model or str(MODEL), settings.revision)
    backend = settings.backend
    if backend == "auto" and (model is None or find_spec("vllm") is None):
        backend = "transformers"
    if options and backend == "transformers":  # before what is wrong without the option that was meant
        raise unknown_options(ctx, options, "the transformers backend")
    check_directions_folder(settings.directions, settings.default_steer)
    named = settings.served_model_name or ("demo" if model is None else served_name(model))
    settings = settings.model_copy(update={"served_model_name": named, "backend": backend})
    if choose_backend(model or str(MODEL), settings) == "vllm":
        from steer.vllm.plugin import serve as serve_on_vllm
        from steer.vllm.settings import from_serve_settings

        logging.basicConfig(level="WARNING", format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("steer").setLevel(settings.log_level.upper())
        os.environ["STEER_LOG_LEVEL"] = settings.log_level  # for the other processes of vLLM
        serve_on_vllm(model or str(MODEL), *from_serve_settings(settings, options))
        return
    if options:
        raise unknown_options(ctx, options, "the transformers backend")
    if settings.readout is not None:
        raise InvalidInput("--readout: the transformers backend reads any number of requests; leave it out")
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    quiet_libraries()
    from steer.serve.app import serve as serve_on_transformers

    serve_on_transformers(model or str(MODEL), settings)


def choose_backend(model: str, settings: ServeSettings) -> str:
    """Return the backend. If vLLM is installed, `--backend auto` means vLLM if it serves the model's architecture."""
    if settings.backend != "auto":
        if settings.backend == "vllm":
            find_vllm_model(model, settings.revision)
        return settings.backend
    from steer.hf.load import find_model
    from steer.vllm.internals.server import serves

    find_model(model, settings.revision)
    return "vllm" if serves(model, settings.revision, trust_remote_code=settings.trust_remote_code) else "transformers"


def inspect(
    file: Annotated[Path, typer.Argument(help="a direction file")],
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Show what a direction file holds: metadata, and for each layer its class means and how they lie along it.

    With --json also the thresholds and targets of one_sided.
    """
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
        if value not in (None, {}, []) and key not in ("selection", "condition"):
            typer.echo(wrapped(f"{key}: {value}", width, first="  ", further="    "))
    if found := direction.meta.condition:
        spec = f"{file.stem}?{Condition(file.stem, found.layer, found.above, found.below)}"
        typer.echo(wrapped(f"condition that was found: {spec}: {found.errors}", width, first="  ", further="    "))
    rows, several = [], any(abs((row["cosine_next"] or 1.0) - 1) > 1e-6 for row in profile)
    for row in profile:
        means = (row["norm_harmful"], row["norm_harmless"], row["component_harmful"], row["component_harmless"])
        figures = (row["angle"], *means, *([row["cosine_next"]] if several else []))
        weights = [row["weight"], *([] if (mlp := row["mlp_weight"]) is None else [mlp])]
        weight_texts = [f"{weight:g}" if row["steered"] else "–" for weight in weights]
        rows.append([str(row["layer"]), *("–" if each is None else f"{each:.3f}" for each in figures), *weight_texts])
    head = ["weight"] if direction.mlp_weights is None else ["attention weight", "MLP weight"]
    columns = ("angle °", "‖harmful‖", "‖harmless‖", "harmful·v", "harmless·v", *(["cos to next"] if several else []))
    typer.echo("\n" + shown(("layer", *columns, *head), rows))


#: Every command, in the order of the help, with the arguments of the example at the end of its help.
COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "serve": (serve, "Qwen/Qwen3-0.6B --directions directions --port 8000"),
    "inspect": (inspect, "directions/refusal.safetensors"),
    "check": (check.check, "directions/refusal.safetensors MODEL --harmful harmful.txt"),
    "fit": (fit.fit, "MODEL --harmful harmful.txt --harmless harmless.txt -o directions/refusal.safetensors"),
    "measure": (
        fit.measure,
        "MODEL --harmful harmful.txt --harmless harmless.txt --vectors -o model.measurement.safetensors",
    ),
    "derive": (
        fit.derive,
        "model.measurement.safetensors --method slerp --t 0.5 --layer 14 -o directions/refusal.safetensors",
    ),
    "methods": (fit.methods, "slerp"),
    "convert": (export.convert, "refusal.gguf directions/refusal.safetensors --model MODEL"),
    "bake": (export.bake, "MODEL --direction directions/refusal.safetensors --mode ablate -o model-without-refusal"),
    "push": (export.push, "directions/refusal.safetensors OWNER/NAME --private"),
    "pull": (export.pull, "OWNER/NAME -o directions/refusal.safetensors"),
    "eval": (
        evaluate.evaluate,
        "MODEL --direction directions/refusal.safetensors --harmful held-out.txt --harmless harmless.txt "
        "--report report",
    ),
    "classify": (evaluate.classify, "answers.jsonl --behaviour refusal"),
    "select": (
        search.select,
        "model.measurement.safetensors MODEL --harmful harmful.txt --harmless harmless.txt "
        "-o directions/refusal.safetensors",
    ),
    "search": (
        search.search,
        "MODEL --harmful harmful.txt --harmless harmless.txt --folder search --trials 200",
    ),
    "trials": (search.trials, "search --save 17 -o directions/refusal.safetensors"),
    "keys new": (admin.new_key, "alice --policy policy.toml --direction refusal --readout"),
    "keys list": (admin.list_keys, "--policy policy.toml"),
    "audit verify": (admin.verify_audit, "audit.jsonl"),
    "on": (admin.on, "--url http://127.0.0.1:8000"),
    "off": (admin.off, "--reason 'answers look wrong'"),
}
GROUPS = {
    "keys": typer.Typer(help="Make and list API keys.", no_args_is_help=True),
    "audit": typer.Typer(help="Check audit logs.", no_args_is_help=True),
}
for name, group in GROUPS.items():
    app.add_typer(group, name=name)
for name, (command, example) in COMMANDS.items():
    *inside, own = name.split()
    (GROUPS[inside[0]] if inside else app).command(
        own,
        cls=_Command,
        # a command that takes the context passes the options that it does not know to vLLM
        context_settings=VLLM_OPTIONS if "ctx" in signature(command).parameters else None,
        epilog=f"Example: steer {name} {example}",
    )(reported()(expanded(command)))
