"""Runs one SGLang engine through a list of steps, in a process of its own: `drive.py IN OUT`.

IN is JSON: {"engine": arguments of sgl.Engine, "steps": [{"requests": [...]} or {"flush": true}]}.
A request is {"text", "images": [[seed, width, height]], "max_new_tokens", "abort_after"}, where
abort_after is the number of tokens after which it is aborted. The requests of a step go in
together. OUT gets, for each step, the results of its requests or whether the flush succeeded.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


async def serve(engine: Any, rid: str, request: dict) -> dict:
    """One request, streamed, as far as it gets."""
    images = [picture(*image) for image in request.get("images", [])]
    sampling = {
        "temperature": 0,
        "max_new_tokens": request["max_new_tokens"],
        "ignore_eos": True,
    }
    stream = await engine.async_generate(
        prompt=request["text"],
        image_data=images or None,
        sampling_params=sampling,
        stream=True,
        rid=rid,
    )
    abort_after, last = request.get("abort_after"), {}
    async for last in stream:
        if abort_after is not None and len(last["output_ids"]) >= abort_after:
            engine.tokenizer_manager.abort_request(rid=rid)
            abort_after = None
    info = last["meta_info"]
    return {
        "output_ids": last["output_ids"],
        "cached_tokens": info.get("cached_tokens", 0),
        "finish": info["finish_reason"]["type"],
        "retractions": info.get("num_retractions", 0),
    }


async def take_step(engine: Any, number: int, step: dict) -> Any:
    if step.get("flush"):
        for _ in range(50):  # the last request is released a moment after its last token
            if (await engine.tokenizer_manager.flush_cache()).success:
                return True
            await asyncio.sleep(0.2)
        return False
    # Of one length: SGLang aborts every request whose id begins with the one that is named.
    requests = enumerate(step["requests"])
    return await asyncio.gather(*(serve(engine, f"{number}-{i:04}", r) for i, r in requests))


def main() -> None:
    import sglang
    from sglang.srt.utils import kill_process_tree

    spec = json.loads(Path(sys.argv[1]).read_text())
    engine = sglang.Engine(**spec["engine"])

    async def run() -> list:
        out = [await take_step(engine, i, step) for i, step in enumerate(spec["steps"])]
        await asyncio.sleep(2)  # the idle memory check runs, and ends the engine if a slot is lost
        return out

    Path(sys.argv[2]).write_text(json.dumps(engine.loop.run_until_complete(run())))
    # Engine.shutdown() of this version raises for LLaVA.
    kill_process_tree(os.getpid(), include_parent=False)
    os._exit(0)


if __name__ == "__main__":
    main()
