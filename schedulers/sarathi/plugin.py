"""Declaration of the Sarathi-Serve plug-in."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from vllm_plugins.errors import PluginError
from vllm_plugins.plugin import Options, Paper, SchedulerPlugin

if TYPE_CHECKING:
    from vllm.config import SchedulerConfig, VllmConfig

    from vllm_plugins.engine.cost_model import StepCostModel
    from vllm_plugins.schedulers.sarathi.policy import SarathiPolicy

PAPER_BUDGET = 512
"""Token budget that the artifact of Sarathi-Serve uses under its strict targets for every model."""


def _number(value: object) -> object:
    """Read a number that the command line gives as text; a choice of numbers does not by itself."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _largest_tile(ceiling: int) -> int:
    """Return the largest tile, up to CUDA's usual 128 rows, that divides the ceiling."""
    return next(tile for tile in (128, 64, 32, 16, 1) if ceiling % tile == 0)


logger = logging.getLogger("vllm.vllm_plugins.sarathi")


class SarathiOptions(Options):
    """Options of Sarathi-Serve."""

    tbt_slo_ms: float | None = Field(
        None, gt=0, description="Target time between two tokens of a request, in ms."
    )
    ttft_slo_ms: float | None = Field(
        None, gt=0, description="Target time to a request's first token, in ms; orders the queue."
    )
    token_budget: int | None = Field(
        None,
        ge=1,
        description="Rows of a step in static mode; by default 512, or --max-num-batched-tokens "
        "if that is smaller.",
    )
    budget_mode: Literal["static", "model", "slack"] | None = Field(
        None,
        description="static: one budget; model: the largest step predicted to meet tbt_slo_ms; "
        "slack: the same against the time left until the next token is due. By default model "
        "with tbt_slo_ms, else static.",
    )
    profile: Path | None = Field(
        None, description="Cost profile written by `vllm-plugins profile`, a JSON file."
    )
    online_fit: bool = Field(
        True, description="Correct the profile while serving, or learn the step times without one."
    )
    margin: float = Field(
        1.2,
        ge=1.0,
        le=2.0,
        description="A step is planned for tbt_slo_ms divided by this, or by more where steps are "
        "seen to exceed their predictions further.",
    )
    tile: Annotated[Literal[1, 16, 32, 64, 128, 256] | None, BeforeValidator(_number)] = Field(
        None,
        description="Rows of a matrix tile; budgets are multiples. By default 1 on CPU, elsewhere "
        "the largest up to 128 that divides --max-num-batched-tokens.",
    )
    min_budget: int | None = Field(
        None, ge=1, description="Least rows of a step with prefill work. By default 128, CPU 16."
    )
    max_prefills_per_step: Annotated[Literal[0, 1], BeforeValidator(_number)] = Field(
        0, description="1: decode-maximal steps with a single prefill chunk; 0: no limit."
    )
    decode_first: bool = Field(True, description="Try every decode before any prefill.")
    pp_balance: bool | None = Field(
        None,
        description="Spread decodes evenly over a pipeline's micro-batches. By default on with "
        "pipeline parallelism.",
    )
    order: Literal["fcfs", "least_slack"] | None = Field(
        None,
        description="Order of waiting requests. By default least_slack with ttft_slo_ms, else "
        "fcfs.",
    )
    max_wait_ms: float = Field(
        60_000.0, gt=0, description="In least_slack order, who waited longer goes first, in ms."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.mode() != "static" and self.profile is None and not self.online_fit:
            raise ValueError(f"budget_mode={self.mode()} needs profile or online_fit=true")
        if self.queue_order() == "least_slack" and not self.decode_first:
            raise ValueError("order=least_slack needs decode_first=true")
        if self.budget_mode == "static" and self.tbt_slo_ms is not None:
            raise ValueError("budget_mode=static does not use tbt_slo_ms; drop one of the two")
        if self.token_budget is not None and self.mode() != "static":
            raise ValueError(f"token_budget is for budget_mode=static, not {self.mode()}")
        return self

    def mode(self) -> Literal["static", "model", "slack"]:
        """Return the budget mode with its default resolved."""
        return self.budget_mode or ("static" if self.tbt_slo_ms is None else "model")

    def queue_order(self) -> Literal["fcfs", "least_slack"]:
        """Return the order of waiting requests with its default resolved."""
        return self.order or ("fcfs" if self.ttft_slo_ms is None else "least_slack")

    def resolved(self, config: VllmConfig) -> SarathiOptions:
        """Return the options with every default that depends on the engine filled in."""
        cpu = config.device_config.device_type == "cpu"
        ceiling = config.scheduler_config.max_num_batched_tokens
        tile = self.tile or (1 if cpu else _largest_tile(ceiling))
        values = {
            "budget_mode": self.mode(),
            "token_budget": self.token_budget or min(PAPER_BUDGET, ceiling),
            "tile": tile,
            "min_budget": self.min_budget or (16 if cpu else 128),
            "order": self.queue_order(),
            "pp_balance": config.parallel_config.pipeline_parallel_size > 1
            and self.pp_balance is not False,
        }
        return self.model_copy(update=values)


class SarathiPlugin(SchedulerPlugin):
    """Stall-free batches whose size is chosen by a latency target."""

    name = "sarathi"
    summary = "Stall-free batching with a token budget sized by a time-between-tokens target."
    papers = (
        Paper(
            "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve",
            "2403.02310",
        ),
        Paper(
            "SARATHI: Efficient LLM Inference by Piggybacking Decodes with Chunked Prefills",
            "2308.16369",
        ),
    )
    exactness = "exact"
    Options: ClassVar[type[Options]] = SarathiOptions

    def orders_waiting(self, options: SarathiOptions) -> bool:
        """Whether waiting requests are put in order of their slack."""
        return options.queue_order() == "least_slack"

    def check(self, options: SarathiOptions, config: VllmConfig) -> None:
        """Refuse engines whose steps have no budget, and budgets that the engine cannot hold."""
        super().check(options, config)
        scheduler, model = config.scheduler_config, config.model_config
        if not scheduler.enable_chunked_prefill:
            raise PluginError(
                "--plugin sarathi", "needs chunked prefill", "drop --no-enable-chunked-prefill"
            )
        if model.runner_type != "generate" or model.is_encoder_decoder:
            kind = "an encoder-decoder" if model.is_encoder_decoder else f"a {model.runner_type}"
            raise PluginError(
                "--plugin sarathi", f"{kind} model has no decode steps", "drop --plugin sarathi"
            )
        self._check_sizes(options, options.resolved(config).tile or 1, scheduler)
        if options.max_prefills_per_step == 1 and scheduler.long_prefill_token_threshold > 0:
            raise PluginError(
                "--plugin sarathi: max_prefills_per_step=1",
                "gives one prompt the whole budget, --long-prefill-token-threshold takes it away",
                "drop one of the two",
            )
        if options.pp_balance and config.parallel_config.pipeline_parallel_size == 1:
            logger.warning("vllm-plugins: sarathi: pp_balance does nothing without pipeline stages")
        self._cost_model(options, config)

    def _check_sizes(self, options: SarathiOptions, tile: int, scheduler: SchedulerConfig) -> None:
        ceiling = scheduler.max_num_batched_tokens
        sizes = {
            "token_budget": options.token_budget,
            "min_budget": options.min_budget,
            "tile": options.tile,
        }
        for name, value in sizes.items():
            if value is not None and value > ceiling:
                raise PluginError(
                    f"--plugin sarathi: {name}={value}",
                    f"is more than --max-num-batched-tokens {ceiling}",
                    "lower the one or raise the other",
                )
        if ceiling % tile:
            raise PluginError(
                f"--plugin sarathi: tile={tile}",
                f"does not divide --max-num-batched-tokens {ceiling}",
                "choose another tile or a multiple of it",
            )
        if options.token_budget is not None and options.token_budget % tile:
            raise PluginError(
                f"--plugin sarathi: token_budget={options.token_budget}",
                f"is not a multiple of the tile of {tile} rows",
                "choose a multiple, or set tile=1",
            )

    def _cost_model(self, options: SarathiOptions, config: VllmConfig) -> StepCostModel | None:
        """Return the profile's model, refusing a target that no step can meet."""
        if options.profile is None:
            return None
        from vllm_plugins.engine.cost_model import StepWork
        from vllm_plugins.engine.cost_profile import read_profile

        model = read_profile(options.profile, config).cost_model()
        rows = max(1, config.scheduler_config.max_num_seqs // 4)
        least_ms = 1000 * model.seconds(StepWork(rows, rows))
        if options.tbt_slo_ms is not None and options.tbt_slo_ms < least_ms:
            raise PluginError(
                f"--plugin sarathi: tbt_slo_ms={options.tbt_slo_ms:g}",
                f"a step of {rows} decodes alone takes {least_ms:.0f} ms here",
                f"allow at least {least_ms:.0f} ms or lower --max-num-seqs",
            )
        return model

    def policy(self, options: SarathiOptions, config: VllmConfig) -> SarathiPolicy:
        """Make the policy of one engine."""
        from vllm_plugins.schedulers.sarathi.estimator import StepTimeEstimator
        from vllm_plugins.schedulers.sarathi.policy import SarathiPolicy

        resolved = options.resolved(config)
        model = self._cost_model(options, config)
        # A static budget asks for no prediction, so nothing need be learnt for one.
        learn = options.online_fit and resolved.budget_mode != "static"
        estimator = StepTimeEstimator(model, resolved.tile or 1, learn)
        return SarathiPolicy(resolved, estimator)
