"""A causal model of Hugging Face transformers as a `LanguageModel`: built from the config.json of a local folder, without a network.

Parameters have the names that transformers gives them. What config.json says goes, dropout included; of [model] only `context` counts.
Code that comes with a checkpoint is never run (`trust_remote_code`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from keepstep.trainer.config import ModelSection

from .parts import INIT_STD, LanguageModel, Memory


class Hugging(LanguageModel):
    """Its parameters are on the meta device until `to_empty`; its buffers have their values.

    Attributes:
        inner: transformers' own object. Its parts are this module's parts, and it is none of them: names stay as they are there.
    """

    inner: Any
    settings: Any  # transformers' config

    def __init__(self, config: ModelSection, vocabulary: int, outputs: int = 0) -> None:
        """
        Args:
            vocabulary: tokens of the tokenizer; the model may have more.
            outputs: columns of the output layer where these are classes; 0: the model's own.

        Raises:
            ImportError: transformers is missing; the message says what to install.
            ValueError: model.folder describes no model that can be built here, or one that is too small.
        """
        super(LanguageModel, self).__init__()
        self.adapters = {}
        self.config, self.context, self.vocabulary, self.head = config, config.context, vocabulary, None
        settings = _settings(config)
        _check(config, settings, vocabulary)
        settings.tie_word_embeddings = settings.tie_word_embeddings and not outputs
        with _parameters_on_meta() as vectors:
            inner = _model(settings)
            if outputs:
                inner.set_output_embeddings(nn.Linear(inner.get_output_embeddings().in_features, outputs, bias=False))
        for name, child in inner.named_children():
            self.add_module(name, child)
        named = dict(inner.named_parameters())
        assert named.keys() == dict(self.named_parameters()).keys(), "every parameter belongs to a part"
        self._vectors = {name: vectors[parameter] for name, parameter in named.items() if parameter in vectors}
        self._std = float(getattr(settings.get_text_config(), "initializer_range", None) or INIT_STD)
        last = inner.get_output_embeddings()
        self.output_name = next((f"{name}.weight" for name, module in inner.named_modules() if module is last), "")
        # Beside nn.Module's own bookkeeping: they are parts of this module already.
        self.__dict__.update(inner=inner, settings=settings, blocks=_blocks(inner, settings))

    def forward(self, ids_BT: Tensor, memory: Memory | None = None) -> Tensor:
        cache = None if memory is None else memory.cache
        found = self.inner(input_ids=ids_BT.clamp(min=0), past_key_values=cache, use_cache=memory is not None)
        if memory is not None:
            memory.cache, memory.length = found.past_key_values, memory.length + ids_BT.shape[1]
        logits_BTV: Tensor = found.logits
        return logits_BTV

    def fill(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Matrices N(0, initializer_range), biases 0, norms what their class begins with: 1, or 0 where they scale with 1 + weight."""
        if name in self._vectors:
            value.copy_(self._vectors[name])
        elif value.ndim == 1:
            value.fill_(float(name.endswith("weight")))
        else:
            value.normal_(0.0, self._std, generator=generator)

    def train(self, mode: bool = True) -> Self:
        self.inner.training = mode
        return super().train(mode)

    def to_empty(self, *, device: Any, recurse: bool = True) -> Self:
        """Unlike torch's own it keeps what is tied, and the values of buffers."""
        made: dict[nn.Parameter, nn.Parameter] = {}
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                empty = made.get(parameter)
                if empty is None:
                    empty = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
                    made[parameter] = empty
                setattr(module, name, empty)
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(device))
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """A cast is one of parameters: angles of rotary positions in half precision would be other angles."""
        before = [(module, name, buffer) for module in self.modules() for name, buffer in module.named_buffers(recurse=False)]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, buffer in before:
            setattr(module, name, buffer.to(getattr(module, name).device))
        return self


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"model.kind = \"hf\" needs transformers, which is not installed here ({error}): pip install 'keepstep[hf]'"
        ) from error
    return transformers


def _settings(config: ModelSection) -> Any:
    if not Path(config.folder, "config.json").is_file():
        raise ValueError(f'model.folder = "{config.folder}" holds no config.json: name the local folder of a model of transformers')
    with _told():
        return _transformers().AutoConfig.from_pretrained(config.folder, local_files_only=True, trust_remote_code=False)


def _model(settings: Any) -> Any:
    with _told():
        return _transformers().AutoModelForCausalLM.from_config(settings, dtype=torch.float32, trust_remote_code=False)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What transformers cannot build is a mistake in run.toml."""
    try:
        yield
    except (ValueError, OSError, KeyError, AttributeError) as error:
        raise ValueError(f"transformers cannot build a causal model from the config.json of model.folder: {error}") from error


def _check(config: ModelSection, settings: Any, vocabulary: int) -> None:
    text = settings.get_text_config()
    if vocabulary > text.vocab_size:
        raise ValueError(
            f"the model of model.folder has {text.vocab_size} tokens, and the data's tokenizer {vocabulary}: use the model's own "
            "(data.tokenizer = its tokenizer.json), in another run.root"
        )
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and config.context > longest:
        raise ValueError(f"the model of model.folder has {longest} positions: model.context = {config.context} must not be more")


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[dict[nn.Parameter, Tensor]]:
    """Modules that are built inside have parameters on the meta device and buffers with values, and draw no random number.

    Gives the values with which vectors begin that a class makes by itself (those of torch's own classes are known).
    """
    vectors: dict[nn.Parameter, Tensor] = {}

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # as it is: one that is tied is registered twice
        made = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        if parameter.ndim == 1 and not isinstance(module, (nn.Linear, nn.LayerNorm, nn.RMSNorm)):
            vectors[made] = parameter.detach().clone()
        return made

    handle = register_module_parameter_registration_hook(register)  # type: ignore[arg-type]
    try:
        with torch.random.fork_rng(devices=[]):
            yield vectors
    finally:
        handle.remove()


def _blocks(inner: nn.Module, settings: Any) -> nn.ModuleList:
    """Its layers: the list that has as many members as the config says, else the longest one."""
    lists = [module for module in inner.modules() if isinstance(module, nn.ModuleList)]
    count = getattr(settings.get_text_config(), "num_hidden_layers", 0)
    return next((each for each in lists if len(each) == count), max(lists, key=len))
