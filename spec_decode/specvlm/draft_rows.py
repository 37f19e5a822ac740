"""Which rows of a draft step stand for an image, and which for the question.

Row t of the drafter carries the target's feature of token t and the embedding of token t + 1. So an
image at positions [s, e) of the target is rows [s - 1, e - 1) of the draft. An image that begins
the prompt has a row less, since nothing stands before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_plugins.engine.block_holes.plan import Hole, Span, plan_hole
from vllm_plugins.spec_decode.specvlm.compact import draft_span
from vllm_plugins.spec_decode.specvlm.gate import question_start
from vllm_plugins.spec_decode.specvlm.settings import SpecVLMSettings

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_plugins.engine.block_holes.plan import Choice
    from vllm_plugins.engine.worker_host import RunnerView


def plan_image(settings: SpecVLMSettings, span: Span, block_size: int) -> Hole:
    """Plan the hole of an image's draft rows; none where the mode leaves images whole.

    Args:
        settings: The drafter's.
        span: The image's draft rows [start, end), as positions.
        block_size: Tokens of a block of the attention kernel.
    """
    start, end = span
    choice, length = settings.choice(), end - start
    wanted = length if choice is None else settings.planned(choice, length)
    return plan_hole(start, end, wanted, block_size)


@dataclass(frozen=True)
class RequestImages:
    """A request's images as the draft of a step sees them.

    Attributes:
        prompt: Length of the prompt in tokens.
        image_end: Position behind the last image.
        spans: Rows [start, end) of each image, ascending, as positions.
        contents: What identifies each picture.
    """

    prompt: int
    image_end: int
    spans: tuple[Span, ...]
    contents: tuple[str, ...]


def request_images(prompt: int, items: Sequence[tuple[str, Sequence[Span]]]) -> RequestImages:
    """Shift a request's images by the drafter's one token.

    Args:
        prompt: Length of the prompt in tokens.
        items: Of each picture its identity and the positions [start, end) of its embeddings.
    """
    flat = [(content, start, end) for content, spans in items for start, end in spans]
    # An image of one token at the very start has no draft row.
    rows = [(content, draft_span(start, end)) for content, start, end in flat if end > 1]
    return RequestImages(
        prompt,
        max((end for _, _, end in flat), default=0),
        tuple(span for _, span in rows),
        tuple(content for content, _ in rows),
    )


class StepImages:
    """Reads the images of the step whose draft pass runs.

    Args:
        runner: Of the worker, once the KV cache exists.
    """

    def __init__(self, runner: RunnerView) -> None:
        self._runner = runner
        self.requests: list[RequestImages] = []
        self._starts: list[int] = []
        self._ends: list[int] = []

    def spans(self, common: CommonAttentionMetadata) -> list[Sequence[Span]]:
        """Return each request's image rows, as :class:`HoleView` asks for them."""
        self._starts = common.query_start_loc_cpu.tolist()
        self._ends = common.seq_lens_cpu_upper_bound.tolist()
        self.requests = [
            request_images(
                prompt,
                [
                    (f.identifier, [(a, b + 1) for a, b in f.mm_position.extract_embeds_range()])
                    for f in features
                ],
            )
            for prompt, features in self._runner.media_features(common)
        ]
        return [request.spans for request in self.requests]

    @property
    def total_rows(self) -> int:
        """Rows of the step before any is dropped."""
        return self._starts[-1]

    def content(self, choice: Choice) -> str:
        """Return what identifies the picture of a choice."""
        request, hole = self.requests[choice.request], choice.hole
        return request.contents[request.spans.index((hole.start, hole.end))]

    def question(self, choice: Choice) -> Span | None:
        """Return the rows of the step that hold the question about an image, if all of it is there.

        It is what follows the prompt's last image.
        """
        request, row = self.requests[choice.request], choice.request
        end = self._ends[row]
        # Adding it to a position gives the row.
        shift = self._starts[row + 1] - end
        start = question_start(request.prompt, request.image_end)
        if start + shift < self._starts[row] or request.prompt > end:
            return None
        return start + shift, request.prompt + shift
