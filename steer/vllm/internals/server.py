"""vLLM's OpenAI server: its app, its routes and its command line."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import SchemaValidator

from steer.errors import InvalidInput, UnsupportedModel
from steer.hf.load import read_config
from steer.vllm.internals.base import TESTED, seam, version

if TYPE_CHECKING:  # every process of vLLM imports this module, and only the server's needs these
    from fastapi import FastAPI
    from starlette.applications import Starlette
    from starlette.routing import BaseRoute


def on_app_built(check: Callable[[FastAPI], None]) -> None:
    """Call `check` with the app of this process's server, if there is one, before it serves. The app's builder may be
    in several of vLLM's modules, also in `__main__`."""
    for name, home in list(sys.modules.items()):
        if name == "__main__" or name.startswith("vllm.entrypoints."):
            build = vars(home).get("build_app") if home is not None else None
            if build is not None and not hasattr(build, "_steer"):
                vars(home)["build_app"] = _checking(build, check)


def take_connection(protocol: str) -> None:
    """Make servers of this process use this class for connections, if they leave the choice to uvicorn, as vLLM's does.
    vLLM's own options limit headers only for another class."""
    from uvicorn.config import HTTP_PROTOCOLS

    HTTP_PROTOCOLS["auto"] = protocol


def _checking(build: Callable[..., FastAPI], check: Callable[[FastAPI], None]) -> Callable[..., FastAPI]:
    @functools.wraps(build)
    def building(*args: object, **kwargs: object) -> FastAPI:
        app = build(*args, **kwargs)
        check(app)
        return app

    building._steer = True  # type: ignore[attr-defined]
    return building


def fail_fast(route: BaseRoute) -> None:
    """Make this FastAPI route refuse a body at the first wrong item of a list. vLLM's items are unions of dozens of
    types, and pydantic reports a problem with each: 15 kB of empty objects give a million problems, and the event loop
    waits for all of them."""
    field = getattr(route, "body_field", None)
    if field is not None:
        adapter = seam(field, "_type_adapter")
        adapter.validator = SchemaValidator(_fail_fast(seam(adapter, "core_schema")))


#: Parts of a pydantic schema that contain no schemas.
_NO_SCHEMAS = frozenset(("cls", "default", "expected", "function", "metadata", "serialization"))


def _fail_fast(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        copied = {key: each if key in _NO_SCHEMAS else _fail_fast(each) for key, each in schema.items()}
        return copied | {"fail_fast": True} if schema.get("type") in ("list", "set", "frozenset", "tuple") else copied
    return [_fail_fast(each) for each in schema] if isinstance(schema, list) else schema


def problems_of(route: BaseRoute | None, body: Mapping[str, object]) -> list[dict[str, object]]:
    """The problems of the fields of a body for this FastAPI route, as pydantic reports them, each field checked alone.
    vLLM's own checks of the whole body come first, and can fail on wrong fields in many ways."""
    field = getattr(route, "body_field", None)
    model = getattr(getattr(field, "field_info", None), "annotation", None)
    found: list[dict[str, object]] = []
    for name in sorted(body.keys() & getattr(model, "model_fields", {}).keys()):
        try:
            _adapter(model, name).validate_python(body[name])
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            found.append({**first, "loc": ("body", name, *first["loc"])})
        except Exception as error:  # an error of vLLM's validators, which pydantic does not catch
            found.append({"type": "value_error", "loc": ("body", name), "input": None, "ctx": {"error": str(error)}})
    return found


@functools.cache
def _adapter(model: type[BaseModel], name: str) -> TypeAdapter[object]:
    field = model.model_fields[name]
    kind: Any = Annotated[field.annotation, field]
    adapter: TypeAdapter[object] = TypeAdapter(kind)
    adapter.validator = SchemaValidator(_fail_fast(adapter.core_schema))
    return adapter


#: The name of FastAPI's function that runs a route's function. Errors before it come from reading the arguments.
ENDPOINT = "run_endpoint_function"


def of_the_body(error: BaseException) -> bool:
    """Whether a FastAPI route raised this while it read and checked the body, before its function ran."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_name == ENDPOINT:
            return False
        trace = trace.tb_next
    return True


def template_variables(app: Starlette) -> Mapping[str, object] | None:
    """The default variables of chat templates."""
    return getattr(seam(app.state, "args"), "default_chat_template_kwargs", None)


def served_names(app: Starlette) -> list[str]:
    """The names of all served models: the base model and the adapters."""
    models = seam(app.state, "openai_serving_models")
    names = [path.name for path in seam(models, "base_model_paths")]
    return names + list(getattr(models, "lora_requests", None) or ())


def server_arguments(model: str, options: Sequence[str]) -> Namespace:
    """`vllm serve MODEL OPTIONS` as vLLM parses it. Raises InvalidInput."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            """Raise what vLLM's own prints under the usage of all its options."""
            known = self._option_string_actions
            named = [word.partition("=")[0].rstrip(":") for word in message.split() if word.startswith("--")]
            near = [like for word in named if word not in known for like in get_close_matches(word, known, 1)]
            raise InvalidInput(message + (f"; did you mean {', '.join(near)}?" if near else ""))

    home = _command_line()
    parser = seam(home, "make_arg_parser")(Parser(prog="steer serve --backend vllm"))
    args: Namespace = parser.parse_args([model, *options])
    if getattr(args, "model_tag", None) is not None:
        args.model = args.model_tag
    seam(home, "validate_parsed_serve_args")(args)
    return args


def run_server(args: Namespace, keep_alive: int) -> None:
    """Run what `vllm serve` runs until it is stopped: OpenAI's API in this process, or in as many as the options or
    vLLM decide. `keep_alive`: seconds that an idle connection is kept, unless the environment sets it."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

    os.environ.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", str(keep_alive))
    cli_env_setup()
    seam(ServeSubcommand, "cmd", ["args"])(args)


#: The module that defines the command line of `vllm serve`: from 0.32 on, and before.
_COMMAND_LINE = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")


def _command_line() -> ModuleType:
    for name in _COMMAND_LINE:
        with suppress(ImportError):
            return importlib.import_module(name)
    raise UnsupportedModel(f"vLLM {version()}: none of {_COMMAND_LINE} is there; tested with {TESTED}")


def serves(model: str, revision: str | None, *, trust_remote_code: bool = False) -> bool:
    """Whether vLLM knows the architecture of this model; False if its configuration cannot be read."""
    from vllm import ModelRegistry

    try:
        config = read_config(model, revision, trust_remote_code=trust_remote_code)
    except UnsupportedModel:
        return False
    known = set(ModelRegistry.get_supported_archs())
    return any(architecture in known for architecture in getattr(config, "architectures", None) or ())
