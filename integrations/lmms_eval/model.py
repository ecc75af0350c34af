"""A model of lmms-eval (0.7.3) that answers from compressed caches.

    pip install 'vlcache-triton[transformers]' lmms-eval
    python -m lmms_eval --model vlcache \\
        --model_args pretrained=llava-hf/llava-v1.6-mistral-7b-hf,budget=0.1,policy=snapkv \\
        --tasks docvqa_val --limit 250
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from lmms_eval.api.model import lmms
from loguru import logger
from PIL import Image
from tqdm import tqdm

from vlcache_triton import VLCacheConfig
from vlcache_triton.apps.images import read_image
from vlcache_triton.apps.models import encode, load_model
from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.recipe.policies import POLICIES, VL_CACHE

TUNED = "tuned"
SAMPLING = ("temperature", "top_p", "top_k", "min_p")
MAX_NEW_TOKENS = 1024  # where a task names none, as lmms-eval's own models have it


class VLCacheModel(lmms):
    """A model of the hub that answers from a compressed cache; greedily, unless a task samples.

    Prompts are one user turn, the images first, in the processor's own chat template.

    Args:
        pretrained: a model on the hub, or a folder; its code is never run.
        budget: of VLCacheConfig: a share such as 0.1 or 1.0, or, as a whole number from 2 on,
            tokens a layer.
        policy: a name of vlcache_triton.recipe.policies.POLICIES, or "tuned", which is
            VLCacheConfig.tuned().
        revision: of the model on the hub.
        dtype: a dtype of torch by name, or "auto", the checkpoint's own on a GPU.
        device: of the model; CUDA where there is one.
        batch_size: 1; prompts are read one by one.
        max_batch_size: lmms-eval hands it over; of no effect.
        choices: further fields of VLCacheConfig, such as allocation=uniform.

    Raises:
        ValueError: naming the argument, what was got and what was expected.
        NotImplementedError: in one of several processes, and for models that vl_cache refuses.
    """

    def __init__(
        self,
        pretrained: str,
        budget: float | int = 0.1,
        policy: str = VL_CACHE.name,
        revision: str = "main",
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **choices: Any,
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise NotImplementedError("WORLD_SIZE: got several processes, expected one")
        if str(batch_size) != "1":
            raise ValueError(f"batch_size: got {batch_size!r}, expected 1")
        if dtype != "auto" and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise ValueError(f"dtype: got {dtype!r}, expected 'auto' or a dtype of torch")
        fields = [field.name for field in dataclasses.fields(VLCacheConfig)]
        for name in choices:
            if name not in fields:
                raise ValueError(f"{name}: got an unknown argument, expected one of {fields}")
        policies = {p.name: p for p in POLICIES} | {TUNED: VL_CACHE}
        if policy not in policies:
            raise ValueError(f"policy: got {policy!r}, expected one of {sorted(policies)}")
        self.name, self.policy = policy, policies[policy]
        configure = VLCacheConfig.tuned if policy == TUNED else VLCacheConfig
        self.config = configure(budget=budget, **choices)
        try:
            self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise ValueError(f"device: got {device!r}, expected a device of torch") from error
        try:
            self.model, self.processor = load_model(
                pretrained, device=self._device, dtype=dtype, revision=revision
            )
        except ValueError as error:
            message = f"pretrained: got {pretrained!r}, expected an image-and-text model: {error}"
            raise ValueError(message) from error
        if not getattr(self.processor, "chat_template", None):
            raise ValueError(f"pretrained: got {pretrained!r}, expected one with a chat template")
        with vl_cache(self.model, self.config, policy=self.policy):
            pass  # a model that it refuses is refused before any data is fetched
        self.kept_shares: list[float] = []  # of the K and V bytes of each prompt so far

    @property
    def device(self) -> torch.device:
        return self._device

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers, in the order of the requests, each cut before the first of its `until`."""
        answers = []
        with vl_cache(self.model, self.config, policy=self.policy) as session:
            for request in tqdm(requests, desc="answering"):
                context, options, doc_to_visual, doc_id, task, split = request.args
                images = doc_to_visual(self.task_dict[task][split][doc_id])
                generation, until = _generation(options)
                inputs = self.encode(images, context)
                tokens = self.model.generate(**inputs, **generation)
                report = session.report()
                share = 1.0 if report is None else report.bytes_after / report.bytes_before
                self.kept_shares.append(share)
                new = tokens[0, inputs["input_ids"].shape[1] :]
                answer = self.processor.decode(new, skip_special_tokens=True)
                for stop in until:
                    answer = answer.partition(stop)[0]
                answers.append(answer.strip())
                self.cache_hook.add_partial("generate_until", (context, options), answers[-1])
        if self.kept_shares:
            mean = sum(self.kept_shares) / len(self.kept_shares)
            logger.info(
                f"vlcache: kept {mean:.4f} of the prompts' KV bytes, the mean of"
                f" {len(self.kept_shares)} prompts"
                f" (policy {self.name}, budget {self.config.budget})"
            )
        return answers

    def encode(self, images: list[Any], context: str) -> Any:
        """One user turn, images first, as the inputs of `generate`, on the model's device."""
        for image in images:
            if not isinstance(image, Image.Image):
                raise NotImplementedError(
                    f"doc_to_visual: got {type(image).__name__}, expected images (PIL)"
                )
        mark = getattr(self.processor, "image_token", None)
        if mark and mark in context:
            raise NotImplementedError(f"context: got {mark} in it, expected none: images go first")
        return encode(self.model, self.processor, [read_image(x) for x in images], context)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "loglikelihood: scores a given text from the prefill, which is not compressed;"
            " expected a task that generates (generate_until)"
        )

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError(
            "generate_until_multi_round: expected a task of one round (generate_until)"
        )


def _generation(options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A task's generation_kwargs as (arguments of `generate`, texts to stop at)."""
    arguments = {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": 1, **options}
    until = arguments.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list) or not all(isinstance(x, str) and x for x in until):
        raise ValueError(f"until: got {until!r}, expected a text or a list of texts")
    temperature = arguments.get("temperature")
    samples = bool(arguments.get("do_sample", temperature)) and temperature != 0
    arguments["do_sample"] = samples
    if not samples:  # what tasks write beside do_sample: false would only raise warnings
        for name in SAMPLING:
            arguments.pop(name, None)
    return arguments, until
