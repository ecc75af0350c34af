"""Load a vision-language model, show it images and a prompt, and take its answer."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from vlcache_triton import VLCacheConfig
from vlcache_triton.apps.formreader import load_form_reader
from vlcache_triton.apps.images import read_image
from vlcache_triton.apps.models import encode, load_model
from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.integrations.transformers.names import CACHE
from vlcache_triton.recipe.policies import VL_CACHE, Policy
from vlcache_triton.recipe.report import CompressionReport

from .console import UserError, one_line
from .hub import check_exists

EMBEDDED = "form-reader"


@dataclass(frozen=True)
class Answer:
    """A model's answer to one prompt.

    kv_bytes: K and V of the prompt as cached after prefill, or after compression; the generated
        tokens, which are never compressed, are not counted.
    kept: tokens of the prompt that each KV head keeps, per layer.
    seconds: prefill, compression and decoding together.
    report: what compression did; None with the full cache.
    """

    text: str
    num_tokens: int
    kv_bytes: int
    kept: list[int]
    seconds: float
    report: CompressionReport | None


class VisionLanguageModel:
    """A model and its processor.

    Args:
        source: a model on the hub or a folder; None is the embedded form reader.
        device: "cpu", "cuda" or "cuda:1"; None is the GPU where there is one.
        dtype: of torch, by name; "auto" is the checkpoint's own on a GPU, and float32 on a CPU and
            for the form reader.
    """

    def __init__(
        self, source: str | None, *, device: str | None = None, dtype: str = "auto"
    ) -> None:
        self.name, self.is_embedded = source or EMBEDDED, source is None
        self.device = choose_device(device)
        logging.set_verbosity_error()
        if self.is_embedded or not sys.stderr.isatty():
            logging.disable_progress_bar()
        if source is None:
            self.model: Any
            self.processor: Any
            chosen = torch.float32 if dtype == "auto" else getattr(torch, dtype)
            self.model, self.processor = load_form_reader(device=self.device, dtype=chosen)
            return
        check_exists(source)
        try:
            self.model, self.processor = load_model(source, device=self.device, dtype=dtype)
        except ValueError as error:
            raise UserError(f"model: cannot load {source!r}: {one_line(str(error))}") from error
        except torch.OutOfMemoryError as error:
            raise UserError(str(error)) from error

    def encode(self, images: Sequence[Image.Image], prompt: str) -> Any:
        """A user's turn, images first, as the inputs of `generate`, on the model's device."""
        with refusals():
            return encode(self.model, self.processor, images, prompt)

    def answer(
        self,
        inputs: Any,
        config: VLCacheConfig,
        max_new_tokens: int,
        advance: Callable[[], None] | None = None,
        *,
        policy: Policy = VL_CACHE,
        streaming: bool = False,
    ) -> Answer:
        """Decode greedily from a cache compressed as `config` and `policy` say, calling `advance`
        at each token.

        A lossless choice is the stock model with its stock cache.
        """
        arguments = {
            **inputs,
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "num_beams": 1,
            "return_dict_in_generate": True,
            "streamer": None if advance is None else _Ticks(advance),
        }
        block: Any = nullcontext()
        if not policy.configure(config).is_lossless:
            block = vl_cache(self.model, config, policy=policy, streaming=streaming)
        started = self._now()
        with refusals(), block as session:
            output = self.model.generate(**arguments)
        seconds = self._now() - started
        report = None if session is None else session.report()
        prompt_length = inputs["input_ids"].shape[1]
        new = output.sequences[0, prompt_length:]
        text = self.processor.decode(new, skip_special_tokens=True).strip()
        if report is None:
            cache = output[CACHE]
            kv_bytes, kept = _dense_bytes(cache, prompt_length), [prompt_length] * len(cache.layers)
        else:
            kv_bytes, kept = report.bytes_after, [kept for (kept,) in report.kept]
        return Answer(text, len(new), kv_bytes, kept, seconds, report)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def about(name: str, device: torch.device) -> dict[str, str]:
    """What to say of a measurement: model, date, machine, versions."""
    is_gpu = device.type == "cuda"
    return {
        "model": name,
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name(device) if is_gpu else f"{os.cpu_count()} CPU cores",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__},"
        f" transformers {transformers.__version__}",
    }


def choose_device(name: str | None) -> torch.device:
    """The device of this name, or the GPU where there is one."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if num_gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: got {name!r}, expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: got {name!r}, expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise UserError(f"device: got {name!r}, but torch can use {num_gpus} GPUs (vlcache env)")
    return device


def open_images(paths: Sequence[Path]) -> list[Image.Image]:
    """The images as `read_image` reads them."""
    with refusals():
        return [read_image(path) for path in paths]


def _dense_bytes(cache: Any, prompt_length: int) -> int:
    """K and V of the prompt in a stock cache of one sequence, generated tokens left out."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t[..., :prompt_length, :].numel() * t.element_size() for t in tensors)


@contextmanager
def refusals() -> Iterator[None]:
    """What the libraries refuse is for the user to put right."""
    try:
        yield
    except (ValueError, NotImplementedError, torch.OutOfMemoryError) as error:
        raise UserError(str(error)) from error


class _Ticks(BaseStreamer):
    """A streamer that calls `advance` at each generated token."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.advance = advance

    def put(self, value: torch.Tensor) -> None:
        if value.ndim == 1:  # the prompt, which comes first, is a batch
            self.advance()

    def end(self) -> None:
        pass
