"""A model of lmms-eval that answers from caches compressed by any policy to any budget."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms
from PIL import Image

from vlcache_triton import VLCacheConfig
from vlcache_triton.cli.console import UserError
from vlcache_triton.cli.vlm import VisionLanguageModel
from vlcache_triton.integrations.transformers import vl_cache
from vlcache_triton.policies import POLICIES, VL_CACHE, Policy

IMAGE_MARK = "<image>"  # where tasks say that an image goes; ours go first
MAX_NEW_TOKENS = 1024  # where the task does not say
GENERATION = ("temperature", "top_p", "num_beams", "do_sample")


class VLCacheModel(lmms):
    """A vision-language model of Transformers, one prompt at a time.

    Args:
        pretrained: on the hub, or a folder; the embedded form reader where not given.
        budget: share of the KV cache to keep, in (0, 1].
        policy: by its name in vlcache_triton.policies, or "tuned", VLCacheConfig.tuned().
        batch_size: 1.
        device: what lmms-eval was started with; the model is on the GPU where there is one.

    Raises:
        ValueError: naming the argument, and for a model that cannot be loaded.
        NotImplementedError: for several processes.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        budget: float = 0.1,
        policy: str = "vl_cache",
        batch_size: int | str = 1,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if str(batch_size) != "1":
            raise ValueError(f"batch_size: got {batch_size!r}, expected 1")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise NotImplementedError("vlcache: got several processes, expected one")
        self.cache_config, self.policy = choices(policy, budget)
        try:
            self.vlm = VisionLanguageModel(pretrained)
        except UserError as error:
            raise ValueError(str(error).replace("model:", "pretrained:", 1)) from error
        if device is not None and torch.device(device).type != self.vlm.device:
            raise ValueError(f"device: got {device!r}, expected {self.vlm.device!r}")
        self.num_prompts = self.bytes_before = self.bytes_after = 0

    @property
    def kept_share(self) -> float:
        """Of the K and V bytes of all prompts so far that were compressed; NaN without any."""
        return self.bytes_after / self.bytes_before if self.bytes_before else float("nan")

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer to each request, whose arguments are the context, generation options, where
        the document's images come from, and which document it is.

        Raises:
            NotImplementedError: for visuals that are not images.
        """
        answers = []
        with vl_cache(self.vlm.model, self.cache_config, policy=self.policy) as session:
            for request in requests:
                context, options, doc_to_visual, doc_id, task, split = request.args
                images = _images(doc_to_visual(self.task_dict[task][split][doc_id]))
                inputs = self.vlm.encode(images, context.replace(IMAGE_MARK, "").strip())
                session.cache = None
                tokens = self.vlm.model.generate(**inputs, **_generation(options))
                new = tokens[0, inputs["input_ids"].shape[1] :]
                text = self.vlm.processor.decode(new, skip_special_tokens=True).strip()
                answers.append(_until(text, options.get("until")))
                self.cache_hook.add_partial("generate_until", (context, options), answers[-1])
                report = session.report()
                if report is not None:
                    self.num_prompts += 1
                    self.bytes_before += report.bytes_before
                    self.bytes_after += report.bytes_after
        print(
            f"vlcache: {self.policy.name} at {self.cache_config.budget:g} kept"
            f" {self.kept_share:.1%} of the KV cache of {self.num_prompts} prompts",
            file=sys.stderr,
        )
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused: likelihoods are read off a prefill, which compression does not change."""
        raise NotImplementedError("loglikelihood: got such a task, expected one that generates")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused: images of later rounds are not compressed."""
        raise NotImplementedError("generate_until_multi_round: got such a task, expected one round")


def choices(policy: str, budget: float) -> tuple[VLCacheConfig, Policy]:
    """The configuration and the policy of these names.

    Raises:
        ValueError: for a name that is not known, or a budget out of range.
    """
    policies = {p.name: p for p in POLICIES}
    if policy == "tuned":
        return VLCacheConfig.tuned(budget=float(budget)), VL_CACHE
    if policy not in policies:
        raise ValueError(f"policy: got {policy!r}, expected one of {[*policies, 'tuned']}")
    return VLCacheConfig(budget=float(budget)), policies[policy]


def _images(visuals: Sequence[Any] | None) -> list[Image.Image]:
    images = list(visuals or [])
    for image in images:
        if not isinstance(image, Image.Image):
            raise NotImplementedError(f"visuals: got {type(image).__name__}, expected images")
    return [image.convert("RGB") for image in images]


def _generation(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a task as `generate` takes them: greedy, where no temperature is set."""
    found = {k: options[k] for k in GENERATION if options.get(k) is not None}
    if not found.get("temperature"):
        found = {k: x for k, x in found.items() if k == "num_beams"} | {"do_sample": False}
    else:
        found.setdefault("do_sample", True)
    return {"max_new_tokens": options.get("max_new_tokens", MAX_NEW_TOKENS), **found}


def _until(text: str, until: str | Sequence[str] | None) -> str:
    """The text up to the first of the strings that end it."""
    for end in [until] if isinstance(until, str) else until or []:
        if end:
            text = text.split(end)[0]
    return text.strip()
