"""Loads and runs models in transformers, with tokens or with the other input that they take."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import ADAPTER_CONFIG
from lora_merge.core.report import error
from lora_merge.errors import UnsupportedError
from lora_merge.modeling.cut_off import cut_off
from lora_merge.modeling.plain_config import FetchError
from lora_merge.modeling.skeleton import embedding, model_class, parse_config
from lora_merge.verification.forward_comparison import Answer, Prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import torch

_SEED = 0
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModel")
# Length of random input: samples of sound (a quarter of a second at 16 kHz), frames of features.
_SAMPLES = 4000
_FRAMES = 100


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers, PEFT and their progress bars, and keep them from any hub. lora-merge reports what matters."""
    from transformers.utils import logging as own

    level, bars = own.get_verbosity(), own.is_progress_bar_enabled()
    with warnings.catch_warnings(), cut_off():
        warnings.simplefilter("ignore")
        own.set_verbosity(logging.CRITICAL)
        own.disable_progress_bar()
        try:
            yield
        finally:
            own.set_verbosity(level)
            if bars:
                own.enable_progress_bar()


class Deferred:
    """A tensor that is computed when transformers takes it, so that not all of them are in memory beside the model.

    Args:
        make: returns it.

    Reference:
        ``transformers.core_model_loading._materialize_copy`` (transformers 5.23): a slice of all is taken of each value.
    """

    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        self._make = make

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Return a part of the tensor, or all of it."""
        return self._make()[index]


class Loader:
    """Loads the model of a configuration.

    Args:
        config: a ``config.json``.
        root: its directory, for code that the config names.
        dtype: as torch spells it; weights are cast to it.
        trust_remote_code: whether that code may be run.

    Raises:
        UnsupportedError: transformers has no class for the model, and the checkpoint's own code may not be run or does
            not load; or a part of the model would have to be fetched.
    """

    def __init__(self, config: Mapping[str, Any], root: Path, dtype: str, *, trust_remote_code: bool) -> None:
        self._root, self._dtype, self._trust = root, dtype, trust_remote_code
        with quiet():
            self._config, self._class = self._known(config) or self._remote(config)

    def _known(self, config: Mapping[str, Any]) -> tuple[Any, Any] | None:
        """Return the parsed config and transformers' class; None if transformers has no class."""
        known = model_class(config)
        try:
            parsed = None if known is None else parse_config(config)
        except FetchError as exc:
            hint = "leave out --forward: the tensors are recomputed without it"
            raise UnsupportedError(
                [error("unsupported", str(self._root), f"config.json: {exc}", hint)]
            ) from exc
        return None if parsed is None else (parsed, known)

    def _remote(self, config: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the parsed config and the class of the checkpoint's own code."""
        table = config.get("auto_map")
        auto_map: Mapping[str, Any] = table if isinstance(table, dict) else {}
        name = next((name for name in _AUTO_CLASSES if name in auto_map), None)
        architecture = (config.get("architectures") or ["?"])[0]
        if name is None or not self._trust:
            sentence = f"transformers has no class {architecture}, so the model cannot be run"
            hint = "pass --trust-remote-code to run the code in its directory" if name else ""
            raise UnsupportedError([error("unsupported", str(self._root), sentence, hint)])
        from transformers import AutoConfig
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        root, options = str(self._root), {"local_files_only": True}
        try:
            parsed = AutoConfig.from_pretrained(root, trust_remote_code=True, **options)
            return parsed, get_class_from_dynamic_module(auto_map[name], root, **options)
        except Exception as exc:
            # Code may raise anything. Code of another repo is not fetched, which is an error here too.
            first = next(iter(str(exc).splitlines()), "")
            sentence = f"the code in its directory does not load ({type(exc).__name__}: {first})"[:300]
            raise UnsupportedError([error("unsupported", root, sentence)]) from exc

    @contextlib.contextmanager
    def directory(self, root: Path) -> Iterator[tuple[Any, tuple[str, ...]]]:
        """Yield the model with a directory's weights, and the parameters for which it has no tensor.

        Raises:
            UnsupportedError: the directory also has an adapter, which transformers would load onto the model.
        """
        if (root / ADAPTER_CONFIG).exists():
            sentence = f"holds {ADAPTER_CONFIG} beside the model, so transformers would load that adapter too"
            raise UnsupportedError([error("unsupported", str(root), sentence, "move the adapter elsewhere")])
        with self._loaded(root, None) as loaded:
            yield loaded

    @contextlib.contextmanager
    def tensors(self, tensors: Mapping[str, Deferred]) -> Iterator[tuple[Any, tuple[str, ...]]]:
        """Yield the model with tensors under a checkpoint's names, and the parameters without a tensor."""
        with self._loaded(None, dict(tensors)) as loaded:
            yield loaded

    @contextlib.contextmanager
    def _loaded(
        self, root: Path | None, tensors: dict[str, Deferred] | None
    ) -> Iterator[tuple[Any, tuple[str, ...]]]:
        """Yield a model on the devices that exist. Parts that do not fit are offloaded to disk."""
        import gc

        import torch

        with tempfile.TemporaryDirectory(prefix="lora-merge-offload-") as offload:
            with quiet():
                model, info = self._class.from_pretrained(
                    root,
                    config=self._config,
                    state_dict=tensors,
                    dtype=getattr(torch, self._dtype),
                    device_map="auto",
                    offload_folder=offload,
                    local_files_only=True,
                    output_loading_info=True,
                )
            # transformers fills both with random values.
            missing = sorted({*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])})
            try:
                yield model.eval(), tuple(missing)
            finally:
                del model
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()


def answer(model: Any, prompt: Prompt, n_tokens: int) -> Answer:
    """Return what a model generates for a prompt, greedily, with the scores.

    Each token takes a pass over the whole text. That is slower than a cache, and works the same for every family.

    Args:
        model: any model of transformers.
        prompt: the tokens; without tokens, the model gets random input of the right kind.
        n_tokens: how many to generate, if the model can.
    """
    said: list[int] = []
    head = embedding(model, "get_output_embeddings")
    is_text = bool(prompt.ids) and head is not None
    speaks = is_text and _speaks(model)
    for _ in range(n_tokens if speaks else 1):
        result = scores(model, prompt, tuple(said))
        if speaks:
            said.append(int(result[-1].argmax()))
    weight = getattr(head, "weight", None)
    # A classifier may have an output embedding and still give labels.
    is_text = is_text and (weight is None or len(weight) == result.shape[-1])
    return Answer(prompt, tuple(said), result, is_text)


def scores(model: Any, prompt: Prompt, said: tuple[int, ...], seed: int = _SEED) -> Any:
    """Return a model's scores for a prompt and generated tokens: float32 ``[positions, width]``.

    Random numbers in the forward pass come from the seed, so two models draw the same.
    """
    import torch

    ids = torch.tensor([list(prompt.ids)]) if prompt.ids else None
    inputs = _inputs(model, ids)
    if _reads_the_end(model) and "input_ids" in inputs:
        inputs["input_ids"] = _ended(inputs["input_ids"], model.config.eos_token_id)
    elif getattr(model.config, "is_encoder_decoder", False):
        first = getattr(model.config, "decoder_start_token_id", None)
        start = [first if first is not None else 0]
        # A model for sound or images gets its prompt in the decoder.
        begun = () if "input_ids" in inputs else prompt.ids
        inputs["decoder_input_ids"] = torch.tensor([[*start, *begun, *said]])
    elif said and ids is not None:
        inputs["input_ids"] = torch.tensor([[*prompt.ids, *said]])
    # Parameters that are offloaded to disk are on the meta device.
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    # The fork leaves the caller's random numbers as they were.
    with torch.no_grad(), quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model(**{name: value.to(device) for name, value in inputs.items()})
    found = output["logits"] if "logits" in output else next(iter(output.values()))
    return found.detach().float().cpu().reshape(-1, found.shape[-1]).numpy()


def _inputs(model: Any, ids: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return a model's input: tokens, or random pixels, sound or features, the same ones each time."""
    import torch

    name = model.main_input_name
    if name == "input_ids":
        return {"input_ids": ids if ids is not None else torch.tensor([[0, 1, 2, 3]])}
    generator = torch.Generator().manual_seed(_SEED)
    config = model.config
    if name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(config, "num_channels", None) or 3
        n_frames = getattr(config, "num_frames", None)
        frames = (n_frames,) if n_frames else ()
        return {name: torch.randn(1, *frames, channels, height, width, generator=generator)}
    if name == "input_features":
        bins = getattr(config, "num_mel_bins", None) or 80
        n_features = 2 * (getattr(config, "max_source_positions", None) or _FRAMES // 2)
        return {name: torch.randn(1, bins, n_features, generator=generator)}
    return {name: torch.randn(1, _SAMPLES, generator=generator)}


def _reads_the_end(model: Any) -> bool:
    """Return True for a classifier that reads its answer at the end token in the decoder (BART, T5).

    It passes the text itself to the decoder, and needs exactly one end token.
    """
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    is_classifier = type(own).__name__.endswith("ForSequenceClassification")
    return is_classifier and bool(getattr(model.config, "is_encoder_decoder", False))


def _ended(ids: torch.Tensor, end: int) -> torch.Tensor:
    """Return tokens ``[1, n]`` with exactly one end token, at the end."""
    import torch

    return torch.cat([ids[ids != end], ids.new_tensor([end])])[None]


def _speaks(model: Any) -> bool:
    can: Callable[[], bool] | None = getattr(model, "can_generate", None)
    return bool(can and can())
