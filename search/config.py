"""The one configuration of a run: frozen, validated, and the source of the command line's flags and help.

Knows every field, its rule, its default and what it is for. Knows nothing of models, data or the terminal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from compression.refusal import Refusal, nearest
from compression.storage.strict_json import read_object

__all__ = [
    "AFTERWARDS",
    "AGENTS",
    "EVALUATORS",
    "EXPORTS",
    "GRANULARITIES",
    "PLANNERS",
    "PROXIES",
    "PROXY_FORMS",
    "QUICK",
    "Config",
    "Dtype",
    "read_fields",
]

OptimizeFor = Literal["memory", "latency"]
ProxyForm = Literal["answer", "letter"]
Export = Literal["none", "hf", "dense", "gguf-ready"]
Dtype = Literal["auto", "float32", "bfloat16"]
Granularity = Literal["block", "family", "site", "head", "block+family"]

AGENTS = (
    "bandit",
    "evolution",
    "gradient",
    "guided",
    "knapsack",
    "lagrangian",
    "optuna-cmaes",
    "optuna-gp",
    "optuna-nsga2",
    "optuna-qmc",
    "optuna-tpe",
    "portfolio",
    "ppo",
    "ppo-masked",
    "random",
    "reinforce",
    "uniform",
)
PLANNERS = ("guided", "portfolio", "ppo", "ppo-masked", "reinforce")
"""Agents that plan with their budget: with another one they would not have proposed what they did."""
OPTIMIZE: tuple[str, ...] = get_args(OptimizeFor)
EXPORTS: tuple[str, ...] = get_args(Export)
DTYPES: tuple[str, ...] = get_args(Dtype)
PROXY_FORMS: tuple[str, ...] = get_args(ProxyForm)
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
PROXIES = ("arc_easy", "hellaswag", "mmlu", "piqa", "sciq")

QUICK: Mapping[str, int | float] = {
    "budget": 10,
    "calibration_tokens": 4096,
    "repair_tokens": 4096,
    "search_items": 2,
    "search_shards": 2,
    "heldout_tokens": 1024,
    "report_items": 16,
    "heal_minutes": 1.0,
    "benchmark_items": 4,
}
"""What `quick` puts in the place of the defaults; a field given explicitly stays as given."""

EVALUATORS = ("evaluators", "gpus_per_evaluator", "ray_address", "trial_timeout")
"""Fields of who scores."""
_FREE = (
    *("budget", "quick", "threads", "optimize", "prior", "heal_minutes", "out", "resume"),
    *("benchmark_items", "export", "dtype"),
    *EVALUATORS,
)
AFTERWARDS = ("repair_tokens", "heal_minutes", "optimize", "benchmark_items", "export")
"""Fields of what a run does with the schedule it has found."""
_LARGEST_FILE = 1 << 20  # bytes of a configuration file


def _field(default: object, group: str, rule: str, about: str, metavar: str = "N", **limits: Any) -> Any:
    """A field with the rule quoted in its error messages, and the group and placeholder it has in the help."""
    extra: dict[str, JsonValue] = {"group": group, "rule": rule, "metavar": metavar}
    return Field(default, description=about, json_schema_extra=extra, **limits)


def _weight(default: float, of: str) -> Any:
    """A weight of the reward."""
    return _field(
        default,
        "reward",
        "a number from 0 to 1000",
        f"Weight in the reward of {of}.",
        "WEIGHT",
        ge=0.0,
        le=1000.0,
    )


def _one_of(names: Iterable[str]) -> str:
    return "one of " + ", ".join(names)


class Config(BaseModel):
    """Everything that defines a run; fields have the names of the flags. `Config.of(values)` gives one-line errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    agent: str = _field(
        "gradient",
        "search",
        f"{_one_of(AGENTS)}, or module:Class of your own",
        "Who proposes schedules; knapsack, lagrangian and uniform need no search.",
        "NAME",
    )
    budget: int = _field(
        200,
        "search",
        "a whole number of at least 0",
        "How many schedules are evaluated; 0 measures the baselines only.",
        ge=0,
        le=10_000_000,
    )
    target_kept: float = _field(
        0.8,
        "search",
        "a number above 0 and at most 1",
        "Fraction of the parameters of the compressible matrices that is kept.",
        "FRACTION",
        gt=0.0,
        le=1.0,
    )
    granularity: Granularity = _field(
        "block+family",
        "search",
        _one_of(GRANULARITIES),
        "What one decision of the agent covers: a layer, a kind of matrix, one matrix, an attention head (with "
        "--per-head), or layer and kind together.",
        "KIND",
    )
    seed: int = _field(
        0,
        "search",
        "a whole number from 0 to 4294967295",
        "Start of every random generator; the same seed gives the same trials on the same machine.",
        ge=0,
        lt=2**32,
    )
    policy: str | None = _field(
        None,
        "search",
        "a folder with policy.json and policy.safetensors in it, such as that of an earlier run",
        "What an earlier run of the same agent on the same model learned, at this or another target; the search starts "
        "from it.",
        "RUN",
        min_length=1,
    )
    prior: str | None = _field(
        None,
        "search",
        "an existing prior.json",
        "A compression prior, of this or another model, that the search starts from in the place of the closed form.",
        "FILE",
        min_length=1,
    )
    kl_weight: float = _weight(1.0, "lost nats per token")
    correct_weight: float = _weight(0.1, "gained probability of the correct answer, as a fraction")
    compression_weight: float = _weight(1.0, "saved parameters, as a fraction of the compressible matrices'")
    bytes_weight: float = _weight(0.0, "saved bytes, as a fraction of the model's")
    latency_weight: float = _weight(
        0.0, "saved time of the compressible matrices, as a fraction; measures layers on this machine once"
    )
    reward_repair_tokens: int = _field(
        0,
        "reward",
        "a whole number from 0 to 100000000",
        "Score every schedule after a repair on this many tokens of calibration text; each trial then takes minutes on "
        "a processor. 0 scores it as it is.",
        ge=0,
        le=100_000_000,
    )
    model: str = _field(
        "default",
        "model and data",
        "a hub id, a local folder, or default",
        "Which model: default (SmolLM2-135M-Instruct, fetched once), a local folder, or a hub id.",
        "MODEL",
        min_length=1,
        max_length=4096,
    )
    proxy: str = _field(
        "mmlu",
        "model and data",
        _one_of(PROXIES) + ", or an existing .jsonl file",
        'Questions used to measure quality: a name, or a .jsonl file of {"question", "choices", "answer"} lines.',
        "NAME",
    )
    proxy_form: ProxyForm = _field(
        "answer",
        "model and data",
        _one_of(PROXY_FORMS),
        "How a question is scored: by the text of its answers, or by the letters A to D.",
        "FORM",
    )
    per_head: bool = _field(
        False,
        "model and data",
        "true or false",
        "Cut attention matrices into their heads, so that every head is compressed by itself; slower, for analysis.",
    )
    device: str = _field(
        "auto",
        "model and data",
        "auto, cpu, cuda or cuda:N",
        "Where the model runs; auto takes a GPU if there is one.",
        "DEVICE",
        pattern=r"^(auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?)$",
    )
    dtype: Dtype = _field(
        "auto",
        "model and data",
        _one_of(DTYPES),
        "Number type of the model's parameters; auto takes bfloat16 where the hardware multiplies it, else float32. A "
        "run keeps its own, whichever machine continues it.",
        "NAME",
    )
    threads: int | None = _field(
        None,
        "model and data",
        "a whole number from 1 to 1024",
        "Processor threads to use; left out, all that PyTorch finds.",
        ge=1,
        le=1024,
    )
    evaluators: str | None = _field(
        None,
        "evaluators",
        "a whole number from 1 to 9999, or auto",
        "Processes that score schedules at the same time; auto takes as many as the GPUs, or else the processors, have "
        "room for. Left out, one in this process, or auto with --ray-address.",
        "N",
        pattern=r"^(auto|[1-9][0-9]{0,3})$",
    )
    gpus_per_evaluator: float | None = _field(
        None,
        "evaluators",
        "a number above 0 and at most 64",
        "GPUs that one of these processes takes, such as 0.25 for four on a GPU; left out, 1 where the model runs on a "
        "GPU.",
        "N",
        gt=0.0,
        le=64.0,
    )
    ray_address: str | None = _field(
        None,
        "evaluators",
        "auto, or HOST or HOST:PORT of a Ray cluster",
        "Where these processes run: on a Ray cluster, auto being the one this machine belongs to; left out, here.",
        "ADDRESS",
        pattern=r"^(auto|[^\s:/]+(:[0-9]{1,5})?)$",
        max_length=300,
    )
    trial_timeout: float | None = _field(
        None,
        "evaluators",
        "a number of seconds above 0",
        "Give up a trial after this many seconds and replace the process that it ran in; left out, never.",
        "SECONDS",
        gt=0.0,
        le=1e9,
    )
    optimize: OptimizeFor = _field(
        "memory",
        "output",
        _one_of(OPTIMIZE),
        "What the compressed layers are timed for: memory keeps only what is stored, latency also keeps merged or "
        "padded weights where that is faster.",
        "GOAL",
    )
    benchmark_items: int = _field(
        25,
        "output",
        "0, or a whole number from 2 to 100000",
        "Items of each of eight benchmarks on which the run's models are measured at the end; 0 leaves that out. The "
        "command benchmark does it later, with more items and other benchmarks.",
        ge=0,
        le=100_000,
    )
    export: Export = _field(
        "hf",
        "output",
        _one_of(EXPORTS),
        "In which form the resulting model is written into the run's folder. The command export does it later.",
        "FORM",
    )
    quick: bool = _field(
        False,
        "sizes",
        "true or false",
        f"A small run to see everything work ({', '.join(f'{n}={v}' for n, v in QUICK.items())}); "
        "flags given explicitly stay as given.",
    )
    calibration_tokens: int = _field(
        24576,
        "sizes",
        "a whole number from 512 to 100000000",
        "Tokens of text, half of it exam questions, from which the statistics of every matrix are collected.",
        ge=512,
        le=100_000_000,
    )
    repair_tokens: int = _field(
        24576,
        "sizes",
        "a whole number from 0 to 100000000",
        "Tokens of that text with which the searched schedule is repaired, block by block, without training, "
        "unless that does harm; 0 leaves it as it is.",
        ge=0,
        le=100_000_000,
    )
    heal_minutes: float = _field(
        4.0,
        "sizes",
        "a number from 0 to 100000",
        "Minutes for which the result is then trained towards the dense model; 0 leaves that out. The command "
        "heal does it later, and longer.",
        "MINUTES",
        ge=0,
        le=100_000,
    )
    search_items: int = _field(
        4,
        "sizes",
        "a whole number from 1 to 1000000",
        "Questions one trial is scored on; none of them is ever reported on.",
        ge=1,
        le=1_000_000,
    )
    search_text_tokens: int = _field(
        256,
        "sizes",
        "a whole number from 64 to 100000000",
        "Tokens of prose one trial is scored on.",
        ge=64,
        le=100_000_000,
    )
    search_shards: int = _field(
        6,
        "sizes",
        "a whole number from 1 to 1000",
        "Into how many sets of that size trials are spread by chance, so that a search fits no single one.",
        ge=1,
        le=1000,
    )
    heldout_tokens: int = _field(
        3072,
        "sizes",
        "a whole number from 64 to 100000000",
        "Tokens of text for the final table; never seen in calibration or search.",
        ge=64,
        le=100_000_000,
    )
    report_items: int = _field(
        32,
        "sizes",
        "a whole number from 1 to 1000000",
        "Questions for the final table; never seen in calibration or search.",
        ge=1,
        le=1_000_000,
    )
    out: str | None = _field(
        None,
        "output",
        "a new or empty folder",
        "Folder of the run; left out, a new one under results/.",
        "DIR",
        min_length=1,
    )
    resume: str | None = _field(
        None,
        "output",
        "the folder of an earlier run",
        "Continue an interrupted run; its configuration is read from its folder and only --budget may change, "
        f"and not with {', '.join(PLANNERS)}, which plan with it.",
        "RUN",
        min_length=1,
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_quick_sizes(cls, values: Any) -> Any:
        return {**QUICK, **values} if isinstance(values, dict) and values.get("quick") is True else values

    @field_validator("evaluators", mode="before")
    @classmethod
    def _is_a_word(cls, value: object) -> object:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("benchmark_items")
    @classmethod
    def _has_an_error(cls, value: int) -> int:
        if value == 1:  # a standard error takes two
            raise Refusal(value)
        return value

    @field_validator("agent")
    @classmethod
    def _is_an_agent(cls, value: str) -> str:
        if value not in AGENTS and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
            raise Refusal(value)
        return value

    @field_validator("proxy")
    @classmethod
    def _is_a_proxy(cls, value: str) -> str:
        if value not in PROXIES and not (value.endswith(".jsonl") and Path(value).is_file()):
            raise Refusal(value)
        return value

    @field_validator("policy")
    @classmethod
    def _is_a_policy(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not all((Path(value) / name).is_file() for name in ("policy.json", "policy.safetensors")):
            raise Refusal(value)
        return str(Path(value).absolute())  # a resumed run finds it from anywhere

    @field_validator("prior")
    @classmethod
    def _is_a_file(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not Path(value).is_file():
            raise Refusal(value)
        return str(Path(value).absolute())

    @model_validator(mode="after")
    def _starts_from_one_thing(self) -> Self:
        if self.policy is not None and self.prior is not None:
            raise Refusal("policy and prior both say where to start: give one of them")
        return self

    @model_validator(mode="after")
    def _names_one_folder(self) -> Self:
        if self.out is not None and self.resume is not None and Path(self.out).resolve() != Path(self.resume).resolve():
            raise Refusal(f"out and resume name different folders, {self.out!r} and {self.resume!r}: give only resume")
        return self

    @model_validator(mode="after")
    def _has_the_heads_it_groups(self) -> Self:
        if self.granularity == "head" and not self.per_head:
            raise Refusal("granularity head needs per_head, which cuts attention matrices into their heads")
        return self

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Config:
        """The validated configuration with these field values, defaults for the rest.

        Raises:
            ValueError: one line that starts with the field and states its rule, the value, and the nearest valid name.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise Refusal(_one_line(error)) from None

    def definition(self) -> dict[str, object]:
        """The fields a resumed run may not change: all but the budget and those that say how, where and to what end.

        Nor the prior, which may lie elsewhere by then, and the dtype, which "auto" leaves to the machine: what came of
        them is what counts, see `search.trials.setup.fingerprint`.
        """
        return self.model_dump(exclude=set(_FREE))

    @property
    def in_process(self) -> bool:
        """Whether schedules are scored in this process, one after the other."""
        return self.evaluators in (None, "1") and self.ray_address is None and self.trial_timeout is None

    def to_json(self) -> str:
        """The content of config.json: every field but the folders, so that a run folder may be moved."""
        return json.dumps(self.model_dump(exclude={"out", "resume"}), indent=2) + "\n"


def read_fields(path: Path) -> dict[str, object]:
    """Field values of a JSON configuration file, not yet validated.

    Raises:
        ValueError: one line: not readable, over 1 MiB, not a JSON object, a key twice, or NaN or Infinity in it.
    """
    return read_object(path, "the configuration", _LARGEST_FILE)


def _one_line(error: ValidationError) -> str:
    """The first complaint of pydantic in the words of the field's own rule."""
    first = error.errors()[0]
    if not first["loc"]:
        return re.sub(r"^Value error, ", "", first["msg"])
    name, value = str(first["loc"][0]), first["input"]
    if first["type"] == "extra_forbidden":
        return f"{name} is not a field of the configuration; the nearest is {nearest(name, Config.model_fields)}"
    extra = Config.model_fields[name].json_schema_extra
    rule = extra["rule"] if isinstance(extra, dict) else first["msg"]
    names = {
        "agent": AGENTS,
        "dtype": DTYPES,
        "optimize": OPTIMIZE,
        "proxy": PROXIES,
        "proxy_form": PROXY_FORMS,
        "granularity": GRANULARITIES,
    }.get(name)
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    if names and isinstance(value, str) and not (name == "proxy" and value.endswith(".jsonl")):
        return f"{name} must be {rule}, got {shown}; the nearest is {nearest(value, names)}"
    return f"{name} must be {rule}, got {shown}"
