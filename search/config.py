"""The configuration of a run: frozen and validated. Flags and their help are generated from it.

Knows every field with its rule, default and meaning; does not know models, data or the terminal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from compression.numerics.packed_size import BITS, FLOATING
from compression.refusal import Refusal, nearest
from compression.schedule import ExpertForm, Form
from compression.storage.strict_json import read_object, shown
from search.engines import ENGINES, INTEGERS, Engine
from search.runtime.files import is_text, user_path

__all__ = [
    "AFTERWARDS",
    "AGENTS",
    "ATTENTIONS",
    "BYTES",
    "EARLIER",
    "EMBEDDING_BITS",
    "EVALUATORS",
    "EXPERT_FORMS",
    "EXPORTS",
    "FORMS",
    "FREE_AFTERWARDS",
    "GRANULARITIES",
    "PLANNERS",
    "PROXIES",
    "PROXY_FORMS",
    "QUICK",
    "RECORDED",
    "RETIRED",
    "SERVE",
    "Config",
    "Dtype",
    "absolute_name",
    "bytes_of",
    "read_fields",
]

OptimizeFor = Literal["memory", "latency"]
ProxyForm = Literal["answer", "letter"]
Export = Literal["none", "hf", "dense", "gguf-ready", "plain", "gguf", "compressed-tensors", "mlx"]
Serve = Literal["transformers", "vllm", "llama.cpp", "mlx-lm"]
Dtype = Literal["auto", "float32", "bfloat16"]
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"]
Granularity = Literal["block", "family", "site", "head", "block+family"]

AGENTS = (
    "bandit",
    "evolution",
    "gradient",
    "knapsack",
    "lagrangian",
    "optuna-cmaes",
    "optuna-gp",
    "optuna-nsga2",
    "optuna-qmc",
    "optuna-tpe",
    "ppo",
    "ppo-masked",
    "random",
    "reinforce",
    "uniform",
)
RETIRED = ("guided", "portfolio")
"""Agents of earlier versions. Their runs can still be read, healed and exported; they search no more."""
PLANNERS = ("ppo", "ppo-masked")
"""Agents that plan with their budget: with another budget they would have proposed other schedules."""
OPTIMIZE: tuple[str, ...] = get_args(OptimizeFor)
EXPORTS: tuple[str, ...] = get_args(Export)
SERVE: tuple[str, ...] = get_args(Serve)
FORMS: tuple[str, ...] = get_args(Form)
EXPERT_FORMS: tuple[str, ...] = get_args(ExpertForm)
DTYPES: tuple[str, ...] = get_args(Dtype)
ATTENTIONS: tuple[str, ...] = get_args(Attention)
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
"""Values that `quick` uses instead of the defaults; a field that is given keeps its value."""

EVALUATORS = ("evaluators", "gpus_per_evaluator", "ray_address", "trial_timeout")
"""Fields that say which processes score schedules."""
_FREE = (
    *("budget", "quick", "threads", "optimize", "prior", "heal_minutes", "out", "resume"),
    *("benchmark_items", "export", "dtype"),
    *EVALUATORS,
)
FREE_AFTERWARDS = (
    *("budget", "quick", "threads", "device", "device_map", "optimize", "policy", "prior", "out", "resume"),
    *("benchmark_items", "export"),
    *EVALUATORS,
)
"""Fields that may change after a run has finished: they say where and how it works, not what its results are of."""
AFTERWARDS = ("repair_tokens", "heal_minutes", "optimize", "benchmark_items", "export")
"""Fields of the stages after the search."""
EARLIER: Mapping[str, object] = {
    "form": "factors",
    "shrinkage": 0.01,
    "experts": "fused",
    "embedding_bits": 16,
    "matrix_bits": "16",
}
"""Values of fields that earlier versions did not record, where their runs behaved otherwise than by the default."""
BYTES = 2
"""Bytes of a number in the files of runs that count bytes."""
EMBEDDING_BITS = (FLOATING, *BITS)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
RECORDED = ("digests",)
"""Fields that a run fills in by itself; they have no flag."""
_LARGEST_FILE = 1 << 20  # bytes of a configuration file


def _field(group: str, default: object, rule: str, metavar: str = "N", **limits: Any) -> Any:
    """A field with the group and placeholder it has in the help, and the rule that its error messages quote."""
    extra: dict[str, JsonValue] = {"group": group, "rule": rule, "metavar": metavar}
    return Field(default, json_schema_extra=extra, **limits)


def _whole(group: str, default: int | None, least: int, most: int) -> Any:
    return _field(group, default, f"a whole number from {least} to {most}", ge=least, le=most)


def _weight(default: float) -> Any:
    return _field("reward", default, "a number from 0 to 1000", "WEIGHT", ge=0.0, le=1000.0)


def _name(group: str, default: str, names: Iterable[str], metavar: str = "NAME") -> Any:
    return _field(group, default, _one_of(names), metavar)


def _flag(group: str) -> Any:
    return _field(group, False, "true or false")


def _one_of(names: Iterable[str]) -> str:
    return "one of " + ", ".join(names)


_DATA = "model and data"
_MOST = 100_000_000  # tokens
_DEVICE = r"^(auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?)$"
_DEVICES = r"^(auto|(cpu|cuda:(0|[1-9][0-9]{0,2}))(,(cpu|cuda:(0|[1-9][0-9]{0,2})))*)$"
_ADDRESS = r"^(auto|[^\s:/]+(:[0-9]{1,5})?)$"
_COUNT = r"^(auto|[1-9][0-9]{0,3})$"
_BITS = r"^(16|[2-6]|8)(,(16|[2-6]|8))*$"
_SIZE = r"^(?i:[0-9]+([.][0-9]+)?\s?(B|KB|MB|GB|KiB|MiB|GiB))$"
_POLICY = "a folder with policy.json and policy.safetensors in it, such as that of an earlier run"


class Config(BaseModel):
    """Everything that defines a run. Fields have the names of the flags, and the sentence below a field is its help.

    `Config.of(values)` refuses in one line.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    agent: str = _field("search", "gradient", f"{_one_of(AGENTS)}, or module:Class of your own", "NAME")
    """The agent that proposes schedules; knapsack, lagrangian and uniform compute theirs without a search."""
    budget: int = _whole("search", 200, 0, 10_000_000)
    """Evaluations that the search may use; 0 measures only the baselines."""
    target_kept: float = _field("search", 0.8, "a number above 0 and at most 1", "FRACTION", gt=0.0, le=1.0)
    """Fraction of the parameters of the compressible matrices to keep; with form small, of their bytes."""
    size: str | None = _field("search", None, "a number with its unit, such as 100MB", "SIZE", pattern=_SIZE)
    """Largest size of the exported weights, such as 100MB, instead of target-kept: numbers of 16 bits, places, masks,
    and the embedding in embedding-bits. Unless another form is given, the form is small."""
    target_bytes_kept: float | None = _field("search", None, "a number above 0 and below 1", "FRACTION", gt=0.0, lt=1.0)
    """Fraction of the bytes of the whole model to keep, instead of size."""
    embedding_bits: int | None = _field("search", None, _one_of(map(str, EMBEDDING_BITS)), "BITS")
    """Bits a number of the embedding and the output head with form small; below 16 in groups that share a scale.
    Default: from 3 to 8, one to two more than the size leaves for a number on average."""
    matrix_bits: str | None = _field(
        "search",
        None,
        f"numbers from {', '.join(map(str, EMBEDDING_BITS))} with commas between, such as 4,8",
        "BITS",
        pattern=_BITS,
    )
    """Bits a number that matrices may be rounded to with form small, such as 4,8, in groups that share a scale; any may
    stay in 16. Default: all, from 2 to 8. With 16 alone matrices are pruned and not rounded."""
    granularity: Granularity = _name("search", "block+family", GRANULARITIES, "KIND")
    """What each action of the agent covers: a block, a family of matrices, one matrix (site), an attention head (with
    --per-head), or a block and a family together."""
    form: Form = _name("search", "any", FORMS, "FORM")
    """What the matrices may become: plain, smaller dense matrices, because MLPs lose hidden units and attentions lose
    heads; factors, each matrix decomposed by itself; any, both together, which costs the least quality for its
    parameters; or small, these and matrices of fewer bits or entries, which costs the least quality for its bytes, but
    time too."""
    serve: Serve = _name("search", "transformers", SERVE, "ENGINE")
    """Engine that is to run the result. vllm, llama.cpp and mlx-lm have no factored matrices: form is then plain, or
    with a size small, in the bits that the engine computes with, and export what it loads. For vllm an attention keeps
    all of its heads or none, since its models with blocks of different widths have one number of heads."""
    width_multiple: int | None = _whole("search", None, 1, 65536)
    """Rows and columns that lost units or heads leave are multiples of this. Default: what the device multiplies
    fast."""
    seed: int = _whole("search", 0, 0, 2**32 - 1)
    """Seed of all random generators; the same seed gives the same trials on the same machine."""
    policy: str | None = _field("search", None, _POLICY, "RUN", min_length=1)
    """Start from the policy that an earlier run of the same agent learned on the same model, at any target."""
    prior: str | None = _field("search", None, "an existing prior.json", "FILE", min_length=1)
    """Start from a compression prior, of this or another model, instead of the closed form."""

    kl_weight: float = _weight(1.0)
    """Reward lost per nat per token of KL to the dense model."""
    correct_weight: float = _weight(0.1)
    """Reward gained per unit of probability of the correct answer."""
    compression_weight: float = _weight(1.0)
    """Reward gained for saved parameters, as a fraction of those of the compressible matrices."""
    bytes_weight: float = _weight(0.0)
    """Reward gained for saved bytes, as a fraction of those of the model."""
    latency_weight: float = _weight(0.0)
    """Reward gained for saved time in the compressible matrices, as a fraction; layers are timed here once."""
    reward_repair_tokens: int = _whole("reward", 0, 0, _MOST)
    """Repair every schedule on this many tokens of calibration text before it is scored, which takes minutes per trial
    on a CPU; 0 scores schedules without repair."""

    model: str = _field(
        _DATA, "default", "a hub id, a local folder, or default", "MODEL", min_length=1, max_length=4096
    )
    """Model to compress: default (SmolLM2-135M-Instruct, downloaded once), a local folder, or a hub id."""
    proxy: str = _field(_DATA, "mmlu", f"{_one_of(PROXIES)}, or an existing .jsonl file", "NAME")
    """Questions that measure quality: a data set, or a .jsonl file of {"question", "choices", "answer"} lines, or for a
    classifier of {"text", "label"} lines."""
    proxy_form: ProxyForm = _name(_DATA, "answer", PROXY_FORMS, "FORM")
    """How a question is scored: by the text of its answers, or by the letters A to D."""
    calibration: str | None = _field(
        _DATA,
        None,
        "an existing file, or the hub id of a data set",
        "SOURCE",
        min_length=1,
        max_length=4096,
    )
    """Text to collect the statistics from, instead of prose and exam questions: a text file; a .json, .jsonl or
    .parquet file of {"text"} records or of chats, which are written in the model's chat template; or a hub id. What
    it shares with held-out text and benchmarks is left out."""
    calibration_for_search: bool = _flag(_DATA)
    """Also take the prose of the trials from --calibration: one document in eight, which the statistics then leave
    out."""
    trust_remote_code: bool = _flag(_DATA)
    """Run the code that comes with the model, which can do anything that you can do. The run records the sha256 of its
    files, and later commands refuse other code. Default: such a model is refused."""
    experts: ExpertForm = _name(_DATA, "single", EXPERT_FORMS, "FORM")
    """How the experts of a mixture are compressed: single, each expert by itself; shared, all experts of a layer as one
    matrix, whose factors share a basis; or fused, not at all."""
    per_head: bool = _flag(_DATA)
    """Split attention matrices by head and compress every head by itself; slower, meant for analysis."""
    split_fused: bool = _flag(_DATA)
    """Split fused matrices into their parts q, k and v, or gate and up, so that each part is compressed by itself and
    families mean the same as in models that do not fuse."""
    device: str = _field(_DATA, "auto", "auto, cpu, cuda or cuda:N", "DEVICE", pattern=_DEVICE)
    """Device of the model; auto uses a GPU if there is one."""
    device_map: str | None = _field(
        _DATA, None, "auto, or devices separated by commas", "DEVICES", pattern=_DEVICES, max_length=1000
    )
    """Spread the blocks of the model over several devices: auto uses all GPUs as far as their memory allows; or name
    them, such as cuda:0,cuda:1. Embeddings and output head stay on --device."""
    dtype: Dtype = _name(_DATA, "auto", DTYPES)
    """Data type of the model's parameters; auto uses bfloat16 where the hardware multiplies it and float32 elsewhere. A
    resumed run keeps its data type on every machine."""
    attention: Attention = _name(_DATA, "auto", ATTENTIONS)
    """How transformers computes the attention of the model; auto uses PyTorch's fused attention (sdpa), or eager where
    the architecture has no other."""
    threads: int | None = _whole(_DATA, None, 1, 1024)
    """CPU threads to use. Default: as many as PyTorch chooses."""

    evaluators: str | None = _field("evaluators", None, "a whole number from 1 to 9999, or auto", pattern=_COUNT)
    """Processes that score schedules at the same time; auto starts one per GPU, or as many as the CPU cores allow.
    Needs ray. Default: one, inside this process; auto with --ray-address."""
    gpus_per_evaluator: float | None = _field("evaluators", None, "a number above 0 and at most 64", gt=0.0, le=64.0)
    """GPUs per evaluator, for example 0.25 for four evaluators on one GPU. Default: 1 if the model runs on a GPU."""
    ray_address: str | None = _field(
        "evaluators", None, "auto, or HOST or HOST:PORT of a Ray cluster", "ADDRESS", pattern=_ADDRESS, max_length=300
    )
    """Ray cluster that runs the evaluators; auto is the cluster that this machine belongs to. Default: this machine."""
    trial_timeout: float | None = _field("evaluators", None, "a number of seconds above 0", "SECONDS", gt=0.0, le=1e9)
    """Seconds after which a trial is given up and its process replaced. Default: no limit."""

    optimize: OptimizeFor = _name("output", "memory", OPTIMIZE, "GOAL")
    """What compressed layers are optimized for: memory keeps only the stored cores, latency may also keep merged or
    padded weights where these are faster."""
    benchmark_items: int = _field("output", 25, "0, or a whole number from 2 to 100000", ge=0, le=100_000)
    """Items of each of eight benchmarks that the models of the run are measured on at the end; 0 skips the benchmarks.
    The command benchmark measures later, on more items and other tasks."""
    export: Export = _name("output", "hf", EXPORTS, "FORM")
    """Format in which the result is exported into the run folder. The command export does it later."""

    quick: bool = _field(
        "sizes",
        False,
        "true or false",
        description=f"A small run to see everything work ({', '.join(f'{n}={v}' for n, v in QUICK.items())}); "
        "flags that are given keep their values.",
    )
    calibration_tokens: int = _whole("sizes", 24576, 512, _MOST)
    """Tokens of calibration text, half of it exam questions, that the statistics are collected from."""
    shrinkage: float = _field("sizes", 0.05, "a number above 0 and at most 1", "SHARE", gt=0.0, le=1.0)
    """Share of the statistics that is replaced by equal weights for all directions, against the noise of too little
    text. Less text needs more."""
    repair_tokens: int = _whole("sizes", 24576, 0, _MOST)
    """Tokens of calibration text that the searched schedule is repaired on, without training. Repair is discarded if it
    raises the KL on the selection text; 0 skips it."""
    heal_minutes: float = _field("sizes", 4.0, "a number from 0 to 100000", "MINUTES", ge=0, le=100_000)
    """Minutes of training of the result towards the dense model; 0 skips healing. The command heal does it later, and
    longer."""
    search_items: int = _whole("sizes", 4, 1, 1_000_000)
    """Questions per trial; none of them is ever reported on."""
    search_text_tokens: int = _whole("sizes", 256, 64, _MOST)
    """Tokens of prose per trial."""
    search_shards: int = _whole("sizes", 32, 1, 1000)
    """Shards of the search data, fewer if there are not questions or text enough. Each trial reads one of them; with
    many, a search does not overfit their text."""
    heldout_tokens: int = _whole("sizes", 3072, 64, _MOST)
    """Tokens of held-out text for the final table, never used in calibration or search."""
    report_items: int = _whole("sizes", 32, 1, 1_000_000)
    """Questions for the final table, never used in calibration or search."""

    out: str | None = _field("output", None, "a new or empty folder", "DIR", min_length=1)
    """Folder of the run. Default: a new folder below results/."""
    resume: str | None = _field(
        "output",
        None,
        "the folder of an earlier run",
        "RUN",
        min_length=1,
        description="Continue an interrupted run with the configuration in its folder. Only --budget may change, "
        f"and not with {', '.join(PLANNERS)}, which plan with their budget.",
    )

    digests: dict[str, str] | None = Field(None, json_schema_extra={"rule": "an object of texts"})
    """The sha256 of the user's files that a run depends on, by name: its calibration text and the code of its model.
    A run writes them itself, and every later command refuses other files."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_quick_sizes(cls, values: Any) -> Any:
        return {**QUICK, **values} if isinstance(values, dict) and values.get("quick") is True else values

    @model_validator(mode="before")
    @classmethod
    def _fill_in_what_the_engine_runs(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        sized = values.get("size") is not None or values.get("target_bytes_kept") is not None
        engine = ENGINES.get(str(values.get("serve")), ENGINES["transformers"])
        usual = {"form": "small"} if sized else {} if engine.factors else {"form": "plain"}
        if not engine.factors:
            small = values.get("form", usual["form"]) == "small"
            usual["export"] = engine.rounded if small else engine.plain
        return {**usual, **values}

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
        if value not in (*AGENTS, *RETIRED) and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
            raise Refusal(value)
        return value

    @field_validator("proxy")
    @classmethod
    def _is_a_proxy(cls, value: str) -> str:
        if value not in PROXIES and not (value.endswith(".jsonl") and Path(value).is_file()):
            raise Refusal(value)
        return value if value in PROXIES else absolute_name(value)

    @field_validator("model")
    @classmethod
    def _is_found_from_anywhere(cls, value: str) -> str:
        return absolute_name(value)

    @field_validator("calibration")
    @classmethod
    def _is_a_text(cls, value: str | None) -> str | None:
        if value is None:
            return None
        path = Path(value).expanduser()
        if path.is_file():
            return str(path.absolute())
        if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+|alpaca|ultrachat|openhermes", value, re.ASCII):
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
    def _has_the_widths_it_rounds(self) -> Self:
        if self.form == "factors" and self.width_multiple is not None:
            raise Refusal("width_multiple needs form any or plain; with form factors no width changes")
        return self

    @model_validator(mode="after")
    def _has_the_form_that_rounds(self) -> Self:
        if self.embedding_bits not in (None, *EMBEDDING_BITS):
            raise Refusal(f"embedding_bits must be {_one_of(map(str, EMBEDDING_BITS))}, got {self.embedding_bits}")
        if self.form != "small" and self.embedding_bits not in (None, EMBEDDING_BITS[0]):
            raise Refusal(f"embedding_bits {self.embedding_bits} needs form small, got {self.form}")
        if self.form != "small" and self.matrix_bits not in (None, str(EMBEDDING_BITS[0])):
            raise Refusal(f"matrix_bits {self.matrix_bits} needs form small, got {self.form}")
        return self

    @model_validator(mode="after")
    def _has_one_target(self) -> Self:
        given = [name for name in ("size", "target_bytes_kept") if getattr(self, name) is not None]
        if self.target_kept != Config.model_fields["target_kept"].default:
            given.insert(0, "target_kept")
        if len(given) > 1:
            raise Refusal(f"{given[0]} and {given[1]} both say how small the result is to be: give one of them")
        return self

    @model_validator(mode="after")
    def _is_run_by_its_engine(self) -> Self:
        if not self.engine.factors and self.form not in ("plain", "small"):
            raise Refusal(
                f"serve {self.serve} needs form plain or small, since it has no factored matrices; got {self.form}"
            )
        small = self.form == "small"
        if self.export in ("plain", "gguf") and self.form != "plain" and not (small and self._holds_rounded):
            raise Refusal(f"export {self.export} holds no factored matrices; it needs form plain, got {self.form}")
        if self.export in INTEGERS and not (small and self._holds_rounded):
            engine = next(name for name, each in ENGINES.items() if each.rounded == self.export)
            raise Refusal(f"export {self.export} needs form small and serve {engine}, got {self.form} and {self.serve}")
        if not small:
            return self
        if self.matrix_bits is not None and (other := {*self.offered_bits} - {*self.engine.bits}):
            held = ", ".join(map(str, self.engine.bits))
            raise Refusal(f"{self.serve} holds matrices of {held} bits a number, got {min(other)}")
        ends = {FLOATING, *(self.engine.bits if self.embedding_is_rounded else ())}
        if self.embedding_bits not in (None, *ends):
            held = ", ".join(map(str, sorted(ends, reverse=True)))
            raise Refusal(f"{self.serve} holds an embedding of {held} bits a number, got {self.embedding_bits}")
        return self

    @property
    def _holds_rounded(self) -> bool:
        return self.export == self.engine.rounded

    @model_validator(mode="after")
    def _starts_from_one_thing(self) -> Self:
        if self.policy is not None and self.prior is not None:
            raise Refusal("policy and prior both say where to start: give one of them")
        return self

    @model_validator(mode="after")
    def _has_the_text_it_searches_on(self) -> Self:
        if self.calibration_for_search and self.calibration is None:
            raise Refusal("calibration_for_search needs calibration, the text to take the prose of the trials from")
        return self

    @model_validator(mode="after")
    def _has_one_model_at_a_time(self) -> Self:
        if self.device_map is not None and not self.in_process:
            raise Refusal("device_map gives all devices to one evaluator; leave out evaluators or device_map")
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

    @model_validator(mode="after")
    def _splits_a_matrix_once(self) -> Self:
        if self.split_fused and self.per_head:
            raise Refusal("split_fused and per_head both split attention matrices: give one of them")
        return self

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Config:
        """The validated configuration with these values; other fields have their defaults.

        Raises:
            ValueError: one line that starts with the field and states its rule, the value, and the nearest valid name.
        """
        if unknown := next((name for name in values if name not in cls.model_fields), None):
            near = nearest(unknown[:100], cls.model_fields)
            raise Refusal(f"{shown(unknown)[1:-1]} is not a field of the configuration; the nearest is {near}")
        for name, value in values.items():
            if isinstance(value, str) and not is_text(value):
                raise Refusal(f"{name} must be UTF-8 text, got {shown(value)}; rename the file or folder")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise Refusal(_one_line(error)) from None

    @classmethod
    def of_run(cls, values: Mapping[str, object], trusted: bool, **changes: object) -> Config:
        """The configuration that a run or a prior recorded.

        Fields that earlier versions did not record have the values by which their runs behaved.

        Args:
            values: the recorded fields.
            trusted: as for `of_file`.
            changes: fields with other values.

        Raises:
            ValueError: as for `of_file`.
        """
        return cls.of_file({**EARLIER, **values, **changes}, trusted)

    @classmethod
    def of_file(cls, values: Mapping[str, object], trusted: bool) -> Config:
        """The configuration with values from a file.

        A file may come from anybody, so that it cannot ask for code to be run.

        Args:
            values: the fields.
            trusted: whether the user asks for the code of the model to be run, if the file does so.

        Raises:
            ValueError: as for `of`; or the code of the model is needed, and the user does not ask for it.
        """
        config = cls.of(values)
        if config.trust_remote_code and not trusted:
            names = ", ".join(name for name in config.digests or () if name.startswith("code/"))
            raise Refusal(
                f"the configuration asks for the code that comes with {config.model} ({names or 'not recorded'}); if "
                "you trust it, add --trust-remote-code"
            )
        return config

    def definition(self) -> dict[str, object]:
        """The fields that a resumed run must not change.

        They leave out the budget and the fields that say how and where a run works or what it does after the search.
        They also leave out the prior, which may have moved, and the dtype, which "auto" leaves to the machine; their
        effects are compared by `search.trials.setup.fingerprint`.
        """
        return self.model_dump(exclude=set(_FREE))

    @property
    def engine(self) -> Engine:
        """What the engine that is to run the result can hold."""
        return ENGINES[self.serve]

    @property
    def embedding_is_rounded(self) -> bool:
        """Whether the engine holds an embedding of fewer bits."""
        return min(self.engine.ends) < FLOATING

    @property
    def by_bytes(self) -> bool:
        """Whether the run counts bytes instead of parameters."""
        return self.form == "small" or self.size is not None or self.target_bytes_kept is not None

    @property
    def rounds_embedding(self) -> bool:
        """Whether the embedding and the output head are rounded in the files of the run, if they can be."""
        return self.form == "small" and self.embedding_bits != FLOATING and self.embedding_is_rounded

    @property
    def offered_bits(self) -> tuple[int, ...]:
        """Bits a number that matrices may have with form small, descending; none for other forms."""
        if self.form != "small":
            return ()
        bits = self.matrix_bits
        given = self.engine.bits if bits is None else {int(each) for each in bits.split(",")}
        return tuple(sorted(given, reverse=True))

    @property
    def scale_group(self) -> int:
        """Neighbours of a rounded matrix that share a scale."""
        return self.engine.group

    @property
    def has_factors(self) -> bool:
        """Whether menus offer factors and pruned matrices."""
        return self.form != "plain" and self.engine.factors

    @property
    def in_process(self) -> bool:
        """Whether schedules are scored in this process, one after the other."""
        return self.evaluators in (None, "1") and self.ray_address is None and self.trial_timeout is None

    def to_json(self) -> str:
        """The content of config.json: all fields but the folders, so that a run folder can be moved."""
        return json.dumps(self.model_dump(exclude={"out", "resume"}), indent=2) + "\n"


def bytes_of(size: str) -> int:
    """The bytes of a size such as "100MB" or "1.5 GiB", rounded down."""
    number, unit = re.fullmatch(r"([0-9.]+)\s?([A-Za-z]+)", size).groups()  # type: ignore[union-attr]
    return int(float(number) * _UNITS[unit.upper()])


def absolute_name(value: str) -> str:
    """The name of a model or proxy; of a local folder or file its absolute path, which is found from anywhere.

    Raises:
        Refusal: it begins with the home of a user who has none.
    """
    if value == "default" or value.startswith("random:"):
        return value
    path = user_path(value)
    local = path.is_dir() or (path.suffix in (".gguf", ".jsonl") and path.is_file())
    return str(path.absolute()) if local else value


def read_fields(path: Path) -> dict[str, object]:
    """Field values of a JSON configuration file, not yet validated.

    Raises:
        ValueError: one line: not readable, over 1 MiB, not a JSON object, a key twice, NaN or Infinity in it, or the
            config.json of a model.
    """
    values = read_object(path, "the configuration", _LARGEST_FILE)
    if "model_type" in values:
        above = path.absolute().parent.parent
        run = f"its run, {above}" if (above / path.name).is_file() else "the folder of a run"
        raise Refusal(f"{path} describes a model, not a run: give {run}; benchmark, generate and push take models")
    return values


def _one_line(error: ValidationError) -> str:
    """The first error of pydantic, in the words of the field's own rule."""
    first = error.errors()[0]
    if not first["loc"]:
        return re.sub(r"^Value error, ", "", first["msg"])
    name, value = str(first["loc"][0]), first["input"]
    extra = Config.model_fields[name].json_schema_extra
    rule = extra["rule"] if isinstance(extra, dict) else first["msg"]
    names = {
        "agent": AGENTS,
        "dtype": DTYPES,
        "attention": ATTENTIONS,
        "optimize": OPTIMIZE,
        "proxy": PROXIES,
        "proxy_form": PROXY_FORMS,
        "granularity": GRANULARITIES,
        "form": FORMS,
        "experts": EXPERT_FORMS,
    }.get(name)
    if names and isinstance(value, str) and not (name == "proxy" and value.endswith(".jsonl")):
        return f"{name} must be {rule}, got {shown(value)}; the nearest is {nearest(value[:100], names)}"
    return f"{name} must be {rule}, got {shown(value)}"
