"""The scheduler's part: an image is computed in one step."""

from __future__ import annotations

from vllm_plugins.engine.policy import SchedulerPolicy


class WholeImages(SchedulerPolicy):
    """Has the scheduler host keep images whole: what is chosen of one is chosen once."""

    whole_media = True
