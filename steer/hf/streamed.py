"""A model of any size on the CPU. Its weights are read from their files as it runs, one block at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from steer.errors import UnsupportedModel
from steer.hf import internals
from steer.hf.load import attention_implementation, auto_class, read_config
from steer.hf.steering import Anatomy

#: Reads tensors from the files, by their names in the files.
Read = Callable[[Iterable[str]], Iterable[tuple[str, Tensor]]]
#: Returns the value to use for a parameter, from the parameter's name in the model and its value in the files. float32.
Change = Callable[[str, Tensor], Tensor]


class Streamed:
    """The causal language model that the config in `folder` describes, in float32. At most one *unit* of its weights is
    in memory: a block, or a module outside the blocks that has weights of its own.

    Args:
        names: the names of all tensors in the model's files.
        read: reads these tensors.
        change: changes each parameter after it is read.

    Attributes:
        becomes: for each tensor in the files that the model has, the parameter that is made of it (the first of
            several), and the operations that make the parameter.

    Raises:
        UnsupportedModel: transformers does not know the model, its files lack a parameter, or a unit does not fit in
            memory.
    """

    def __init__(
        self,
        folder: Path,
        names: Iterable[str],
        read: Read,
        change: Change | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        config = read_config(str(folder), trust_remote_code=trust_remote_code)
        kind = auto_class(str(folder), config, whole=True, trust_remote_code=trust_remote_code)
        try:
            with _parameters_on_meta():
                self.model = kind.from_config(
                    config,
                    dtype=torch.float32,
                    attn_implementation=attention_implementation(config),
                    trust_remote_code=trust_remote_code,
                ).eval()
        except (OSError, ValueError, ImportError) as error:
            raise UnsupportedModel(f"{folder}: no causal language model that transformers knows: {error}") from error
        self.anatomy = Anatomy(self.model)
        self._loading, self._read, self._change = internals.WeightLoading(self.model), read, change
        #: By the name of a tensor in the files; see the class's docstring.
        self.becomes = {name: found for name in names if (found := self._loading.parameter(name)) is not None}
        self._files: dict[str, list[str]] = {}
        for name, (parameter, _) in self.becomes.items():
            self._files.setdefault(parameter, []).append(name)
        #: The placeholder of each parameter that is not in memory: NaN in the parameter's shape and without memory of
        #: its own, so that a computation with it shows.
        self._empty: dict[str, nn.Parameter] = {}
        made: dict[int, nn.Parameter] = {}
        self._tied: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            nothing = torch.full((), torch.nan, dtype=torch.float32).expand(parameter.shape)
            self._empty[name] = made.setdefault(id(parameter), nn.Parameter(nothing, requires_grad=False))
            self._tied[id(self._empty[name])].append(name)
        self._free(self._empty)
        buffers = [name for name, (parameter, _) in self.becomes.items() if parameter not in self._empty]
        self._loading.load(dict(read(buffers)))
        for unit, own in self._units():
            unit.register_forward_pre_hook(lambda *_, own=own: self._load(own))
            unit.register_forward_hook(lambda *_, own=own: self._free(own), always_call=True)

    def module_of(self, parameter: str) -> nn.Module:
        return self.model.get_submodule(parameter.rpartition(".")[0])

    def name_of(self, module: nn.Module) -> str:
        return next(name for name, other in self.model.named_modules() if other is module)

    @property
    def parameters(self) -> list[str]:
        return list(self._empty)

    @property
    def head(self) -> str | None:
        """The name of the output embedding's weight."""
        output = self.model.get_output_embeddings()
        return None if output is None else f"{self.name_of(output)}.weight"

    @property
    def tied(self) -> str | None:
        """The name in the files of the parameter that is also the output embedding's weight; None if the output
        embedding has its own."""
        return None if self.head is None else next(iter(self._elsewhere(self.head)), None)

    @property
    def classes(self) -> tuple[str, str] | None:
        """The model's class and the class of its text model, if transformers can load the text model alone from the
        same files (AutoModelForCausalLM), in which modules have other names. None if it cannot."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        own, alone = type(self.model).__name__, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(self.model.config.model_type)
        return None if alone in (None, own) else (own, alone)

    @contextmanager
    def loaded(self, module: nn.Module) -> Iterator[None]:
        """Keep the weights of `module` in memory during the `with` block."""
        prefix = self.name_of(module)
        own = [name for name in self._empty if name.startswith(f"{prefix}.")]
        self._load(own)
        try:
            yield
        finally:
            self._free(own)

    def _units(self) -> list[tuple[nn.Module, list[str]]]:
        """The units, each with the names of its parameters."""
        inside = {id(m): block for block in self.anatomy.blocks for m in block.modules()}
        units: dict[int, tuple[nn.Module, list[str]]] = {}
        for name in self._empty:
            module = self.module_of(name)
            unit = inside.get(id(module), module)
            units.setdefault(id(unit), (unit, []))[1].append(name)
        return list(units.values())

    def _load(self, own: list[str]) -> None:
        size = 6 * sum(self._empty[name].numel() for name in own)  # bytes: 2 as stored in 16 bits, and 4 in float32
        if size > (free := psutil.virtual_memory().available):
            raise UnsupportedModel(
                f"{own[0]} and what is computed with it need {size / 2**30:.1f} GiB of memory, and "
                f"{free / 2**30:.1f} are free"
            )
        modules = {name.rpartition(".")[0] for name in own}
        files = [
            f for parameter, files in self._files.items() if parameter.rpartition(".")[0] in modules for f in files
        ]
        files += [f for name in own for f in self._elsewhere(name)]
        self._loading.load(dict(self._read(dict.fromkeys(files))))
        for name in own:
            empty = self._empty[name]
            read = [t for n in (name, *self._tied[id(empty)]) if (t := self._get(n)) is not empty]
            if not read:
                raise UnsupportedModel(f"{self.anatomy.architecture}: its files have no tensor for {name}")
            found = read[0].detach()
            self._set(name, found if self._change is None else self._change(name, found))
        for name in own:
            for other in set(self._tied[id(self._empty[name])]) - set(own):
                self._set(other, self._empty[other])

    def _elsewhere(self, name: str) -> list[str]:
        """The tensors in the files for the parameters that `name` is tied to, if it has no tensor of its own."""
        if name in self._files:
            return []
        return [file for other in self._tied[id(self._empty[name])] for file in self._files.get(other, ())]

    def _free(self, own: Iterable[str]) -> None:
        for name in own:
            self._set(name, self._empty[name])

    def _get(self, name: str) -> Tensor:
        found = self.module_of(name)._parameters[name.rpartition(".")[2]]
        assert found is not None
        return found

    def _set(self, name: str, value: Tensor) -> None:
        parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        self.module_of(name)._parameters[name.rpartition(".")[2]] = parameter


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that are made in the `with` block have parameters without memory. Their buffers have memory, because no
    tensor in the files makes them."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    patched: Any = nn.Module
    patched.register_parameter = on_meta
    try:
        yield
    finally:
        patched.register_parameter = register
