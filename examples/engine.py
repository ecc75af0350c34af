"""A small inference engine on torch and our kernels alone: no Transformers in its loop.

prompt → statistics → budgets → selection → compaction → decode, for the embedded model, with
continuous batching: requests of unequal length come and go in the slots of one step, which a GPU
replays as a CUDA graph. docs/engine.md walks through it.

    python examples/engine.py --budget 0.6
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from form_reader import FormReader
from torch import Tensor

from vlcache_triton import VLCacheConfig, layer_budgets
from vlcache_triton.ops import BackendName, get_backend


@dataclass
class Request:
    """A prompt `[m]` with its images `[num_images, 3, height, width]`, and what came of it."""

    input_ids: Tensor
    pixel_values: Tensor
    max_new_tokens: int
    answer: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)  # tokens that a KV head keeps, of each layer
    pages: list[int] = field(default_factory=list)


class Engine:
    """Greedy answers over compressed caches, which share the pages of one pool.

    A segment is what one KV head of one layer keeps of one request: pages of its own, and a live
    length of its own. `block_table` and `seqused_k` have them by layer, then slot, then KV head.

    Args:
        budget: share of every prompt's cache that is kept, a float in (0, 1].
        num_slots: requests that decode together.
        num_pages: pages of the pool, of page_size rows of K and V each.
        max_seqlen_k: rows of the longest segment, its answer included; sizes a step's grid.
    """

    def __init__(
        self,
        model: FormReader,
        budget: float = 0.1,
        *,
        backend: BackendName = "auto",
        num_slots: int = 4,
        num_pages: int = 4096,
        page_size: int = 16,
        max_seqlen_k: int = 1024,
    ) -> None:
        self.model, self.config, self.device = model, VLCacheConfig(budget=budget), model.device
        self.kernels = get_backend(backend, self.device)
        self.num_layers, self.num_kv_heads = model.num_layers, model.num_kv_heads
        self.num_slots, self.page_size, self.max_seqlen_k = num_slots, page_size, max_seqlen_k
        self.k, self.v = model.new_zeros(2, num_pages, page_size, 1, model.head_size)
        self.free_pages = list(range(1, num_pages))  # page 0 takes what empty slots write
        # All that a step reads and advances stays where it is, so that a graph finds it again.
        num_segments = num_slots * self.num_kv_heads
        max_pages = -(-max_seqlen_k // page_size)
        self.block_table = self._ints(self.num_layers, num_segments, max_pages)
        self.seqused_k = self._ints(self.num_layers, num_segments)
        self.is_taken = self._ints(num_segments)
        self.one_row = torch.arange(num_segments + 1, dtype=torch.int32, device=self.device)
        self.tokens = torch.zeros(num_slots, dtype=torch.int64, device=self.device)
        self.positions = torch.zeros_like(self.tokens)
        self.step = self._step
        if self.device.type == "cuda":
            self._step()  # compiles all that it calls; every slot is empty yet
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self.step = graph.replay

    def generate(self, requests: Sequence[Request]) -> None:
        """Answer all of them; each joins the batch as soon as a slot and enough pages are free.

        Raises:
            ValueError: for a request that could not be served even alone, before any is.
        """
        for request in requests:
            self._check(request)
        waiting = deque(requests)
        slots: list[Request | None] = [None] * self.num_slots
        while waiting or any(slots):
            for slot, request in enumerate(slots):
                if request is None and waiting and self._has_pages_for(waiting[0]):
                    slots[slot] = self._admit(slot, waiting.popleft())
            for slot, token in enumerate(self.tokens.tolist()):  # waits for the device
                if (request := slots[slot]) is not None:
                    request.answer.append(token)
                    is_full = len(request.answer) == request.max_new_tokens
                    if is_full or token == self.model.eos_token_id:
                        self._release(slot, request)
                        slots[slot] = None
            if any(slots):
                self.step()

    def _admit(self, slot: int, request: Request) -> Request:
        """Put what is kept of a prompt, and its first token, into a slot."""
        length = len(request.input_ids)
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=self.device)
        token, stats, rows = self._prefill(request, cu_seqlens)
        request.kept, indices, cu_kept = self._select(stats, cu_seqlens, length)
        mine = self._segments_of(slot)
        for layer, ((k, v), num_kept) in enumerate(zip(rows, request.kept, strict=True)):
            first = layer * self.num_kv_heads
            table = self.block_table[layer, mine]
            self._take_pages(request, table, num_kept)
            self.kernels.compact_kv(
                *(k, v, cu_seqlens, indices, cu_kept[first : first + self.num_kv_heads + 1]),
                *(self.k, self.v, self.one_row[: self.num_kv_heads + 1]),
                max_kept=num_kept,
                out_block_table=table,
            )
            self.seqused_k[layer, mine] = num_kept
        self.is_taken[mine] = 1
        self.tokens[slot], self.positions[slot] = token, length
        return request

    def _prefill(self, request: Request, cu_seqlens: Tensor) -> tuple[Tensor, list, list]:
        """The first token; the statistics, and K and V `[m, num_kv_heads, d]`, of each layer."""
        length, num_rows = len(request.input_ids), self._query_rows(request)
        cu_rows = cu_seqlens.clamp(max=num_rows)
        x = self.model.read(request.input_ids.to(self.device), request.pixel_values)
        rope = self.model.rope(torch.arange(length, device=self.device))
        stats, rows = [], []
        for layer in range(self.num_layers):
            q, k, v = self.model.project(layer, x, rope)
            measured = self.kernels.post_vision_stats(
                *(q[-num_rows:], k, cu_rows, cu_seqlens, num_rows, length),
                threshold=self.config.threshold,
            )
            stats.append(measured)
            rows.append((k, v))
            heads = (y.transpose(0, 1)[None] for y in (q, k, v))
            out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            x = self.model.finish(layer, x, out[0].transpose(0, 1))
        return self.model.next_token(x[-1:])[0], stats, rows

    def _select(
        self, stats: list, cu_seqlens: Tensor, length: int
    ) -> tuple[list[int], Tensor, Tensor]:
        """Tokens that each layer keeps of a prompt; which, by layer and KV head."""
        density = torch.stack([s.retained.double().mean(1) / s.visible for s in stats])
        keep = layer_budgets(density.cpu(), torch.tensor([length]), self.config)  # [num_layers, 1]
        recent = (self.config.recent_fraction * keep + 0.5).floor().clamp(min=1)
        indices, cu_kept = self.kernels.select_tokens(
            torch.stack([s.scores for s in stats]),
            cu_seqlens,
            keep.int().to(self.device),
            recent.int().to(self.device),
            max_seqlen=length,
            total_kept=self.num_kv_heads * int(keep.sum()),
        )
        return keep.flatten().tolist(), indices, cu_kept

    def _step(self) -> None:
        """Read every slot's token and choose its next: nothing waits, no shape ever changes."""
        x, rope = self.model.embed(self.tokens), self.model.rope(self.positions)
        for layer in range(self.num_layers):
            q, k, v = self.model.project(layer, x, rope)
            used, table = self.seqused_k[layer], self.block_table[layer]
            new = (y.reshape(len(used), 1, 1, -1) for y in (k, v))
            self.kernels.append_kv(*new, self.k, self.v, self.one_row, used, block_table=table)
            out = self.kernels.varlen_decode(
                q.reshape(len(used), -1, q.shape[-1]),  # a segment's query heads are its group
                *(self.k, self.v, self.one_row, self.one_row, 1, self.max_seqlen_k),
                seqused_k=used,
                block_table=table,
            )
            x = self.model.finish(layer, x, out.view(q.shape))
        self.tokens.copy_(self.model.next_token(x))
        self.positions += 1  # go on from the prompt's length, never from what was kept
        self.seqused_k *= self.is_taken  # what empty slots wrote is forgotten

    def _take_pages(self, request: Request, table: Tensor, num_kept: int) -> None:
        """Enter pages for the kept tokens and the answer into a slot's table of one layer."""
        num_pages = -(-(num_kept + request.max_new_tokens) // self.page_size)
        pages = [self.free_pages.pop() for _ in range(self.num_kv_heads * num_pages)]
        table[:, :num_pages] = torch.tensor(pages, dtype=torch.int32).view(-1, num_pages)
        request.pages += pages

    def _release(self, slot: int, request: Request) -> None:
        """Empty a slot, and give its pages back."""
        mine = self._segments_of(slot)
        self.is_taken[mine] = 0
        self.seqused_k[:, mine] = 0
        self.block_table[:, mine] = 0
        self.free_pages += request.pages
        request.pages = []

    def _has_pages_for(self, request: Request) -> bool:
        """Whether there are enough, however its layers come to share them."""
        share = max(self.config.budget, self.config.min_layer_budget)
        rows_of_a_segment = share * len(request.input_ids) + 1 + request.max_new_tokens
        pages = (rows_of_a_segment / self.page_size + 1) * self.num_layers * self.num_kv_heads
        return pages <= len(self.free_pages)

    def _query_rows(self, request: Request) -> int:
        """The post-vision rows: those behind the last visual token; at least the last."""
        visual = (request.input_ids == self.model.image_token_id).nonzero()
        if len(visual) == 0:
            raise ValueError("input_ids: got no visual token, expected a prompt with an image")
        return max(len(request.input_ids) - 1 - int(visual[-1]), 1)

    def _check(self, request: Request) -> None:
        self._query_rows(request)
        room = self.max_seqlen_k - len(request.input_ids)
        if not 1 <= request.max_new_tokens <= room:
            raise ValueError(
                f"max_new_tokens: got {request.max_new_tokens}, expected 1 to {room}"
                f" (max_seqlen_k less the prompt's {len(request.input_ids)} tokens)"
            )
        if not self._has_pages_for(request):
            raise ValueError(f"num_pages: got {len(self.k)}, expected enough for any one request")

    def _segments_of(self, slot: int) -> slice:
        return slice(slot * self.num_kv_heads, (slot + 1) * self.num_kv_heads)

    def _ints(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.device)


def main() -> None:
    """Ask about a few pages at once."""
    from transformers import LlavaProcessor  # for what comes before and after the engine

    from vlcache_triton.apps.formreader import chat, draw_dialogue, encode_chats, render
    from vlcache_triton.apps.formreader.model import WEIGHTS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=0.6, help="share of the cache to keep")
    parser.add_argument("--backend", choices=["auto", "triton", "reference"], default="auto")
    options = parser.parse_args()
    processor = LlavaProcessor.from_pretrained(WEIGHTS, local_files_only=True)
    questions, requests = [], []
    for seed, task in enumerate(("value", "next", "value")):
        dialogue = draw_dialogue(seed, [task])
        questions += dialogue.questions
        messages = chat([render(dialogue.pages[0])], [dialogue.questions[0].text])
        inputs = encode_chats(processor, [messages])
        requests.append(Request(inputs["input_ids"][0], inputs["pixel_values"], 40))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    Engine(FormReader(device), options.budget, backend=options.backend).generate(requests)
    for question, request in zip(questions, requests, strict=True):
        answer = processor.decode(request.answer, skip_special_tokens=True)
        print(f"{question.text}  {answer}  (right: {question.answer})")


if __name__ == "__main__":
    main()
