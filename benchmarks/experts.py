"""Measures how much of public mixtures can be compressed, and compares the forms of experts on a small trained one.

    python -m benchmarks.experts [--quick] [--write] [--steps 500]

The first table is arithmetic on shapes: the default configurations of transformers, which are those of public models,
are built without values, and the parameters of the sites that can be tensorized are divided by those of the model. No
small mixture with weights comes with the data packages. The second table therefore trains one, byte by byte, on the
prose of the calibration split, and gives the KL of the closed form to it on held-out text. Its experts are specialized,
but a model of this size says nothing about quality at large sizes. The third table leaves out the experts of least
predicted cost in every layer, and compares three answers to a token that is sent to one of them: nothing, as in a
schedule; the token's other experts with weights of the same sum; or the router's next choice.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import transformers
from torch.nn import functional

from benchmarks.report import markdown, publish
from compression import lagrangian, to_schedule
from compression.decomposition.apply import ScheduleApplier
from compression.layers.experts import experts_apart, take_apart_
from compression.schedule import ExpertForm
from compression.sites import discover_sites, model_parameters
from search.config import Config
from search.evaluation.workload import Workload
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model
from search.model.random_models import byte_tokenizer

PUBLIC = ("mixtral", "olmoe", "qwen3_moe", "gpt_oss", "granitemoe", "phimoe", "deepseek_v3", "llama4_text")
BLOCKS = 4
"""Blocks that are built of a public model; its blocks repeat, and its embeddings are counted once."""
FORMS: tuple[ExpertForm, ...] = ("single", "shared")
KEPT = (0.6, 0.4, 0.2)
ANSWERS = ("nothing", "others", "next")
SHAPE = {
    "model_type": "qwen3_moe",
    "vocab_size": 257,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "output_router_logits": False,
}
ROWS, LENGTH, TRAINING = 16, 128, 262_144
"""Rows and bytes of a step of training, and bytes of the text that they are taken from."""


def reach(kind: str) -> tuple[float, float]:
    """Shares of the parameters inside the blocks that can be tensorized, with experts fused and taken apart."""
    config = transformers.AutoConfig.for_model(kind)
    config.num_hidden_layers = min(BLOCKS, config.num_hidden_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = 0
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", trust_remote_code=False
        )
    shares = []
    for form in ("fused", "single"):
        take_apart_(model, form, checked=False)
        sites = discover_sites(model, shapes_only=True)
        free = sum(site.parameters for site in sites if not site.dense_because)
        shares.append(free / sum(site.parameters for site in sites))
    return shares[0], shares[1]


def trained(steps: int, rows: torch.Tensor) -> tuple[torch.nn.Module, float]:
    """A small mixture trained on random windows of a byte sequence, and its last losses' mean in nats per byte."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**SHAPE), trust_remote_code=False
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    losses = []
    for step in range(steps):
        starts = torch.randint(len(rows) - LENGTH, (ROWS,))
        ids = torch.stack([rows[start : start + LENGTH] for start in starts])
        output = model(input_ids=ids, output_router_logits=True)
        loss = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        balance = getattr(output, "aux_loss", None)
        (loss if balance is None else loss + 0.01 * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step}: {losses[-1]:.3f} nats per byte", flush=True)
    return model.eval().requires_grad_(False), sum(losses[-20:]) / len(losses[-20:])


def compared(folder: Path, config: Config) -> list[list[object]]:
    """Rows of the second table: the form, what it reaches, and the KL of the closed form at each kept fraction."""
    rows: list[list[object]] = []
    device = torch.device("cpu")
    for form in FORMS:
        own = config.model_copy(update={"model": str(folder), "experts": form})
        loaded, sites = open_model(own, device)
        experiment = Experiment.of(own, loaded, sites, device)
        menu = experiment.menu()
        workload = Workload(experiment.shards("heldout")[0], loaded.model)
        workload.reference(loaded.model)
        cells: list[object] = [form]
        for kept in KEPT:
            schedule = to_schedule(menu, lagrangian(menu, math.floor(kept * menu.dense_parameters)))
            with ScheduleApplier(loaded.model, experiment.store, packed=True) as applier:
                applier.apply_(schedule)
                quality = workload.measure(loaded.model)
            empty = sum(choice.widths == (0,) for name, choice in schedule if name.endswith("down_proj"))
            cells.append(f"{quality.kl:.4f} ± {quality.kl_standard_error:.4f}")
            print(f"{form} kept {kept}: KL {quality.kl:.4f}, {empty} experts left out", flush=True)
        rows.append(cells)
        assert experts_apart(loaded.model)
    return rows


def left_out(folder: Path, config: Config) -> list[list[object]]:
    """Rows of the third table: the experts left out per layer, the share of choices that they had, and the KLs."""
    own, device = config.model_copy(update={"model": str(folder)}), torch.device("cpu")
    loaded, sites = open_model(own, device)
    experiment = Experiment.of(own, loaded, sites, device)
    experiment.menu()
    model, bonds = loaded.model, experiment.store.bonds
    workload = Workload(experiment.shards("heldout")[0], loaded.model)
    workload.reference(model)
    rows = []
    for count in (1, 2, 4):
        gone: dict[str, list[int]] = {}
        for path, experts in experts_apart(model).items():
            costs = [float(bonds.elimination(f"{path}.{number}").cost[0]) for number in range(len(experts))]
            gone[path] = sorted(range(len(costs)), key=costs.__getitem__)[:count]
        found: list[object] = [count]
        for answer in ANSWERS:
            chosen = {"all": 0, "gone": 0}
            with ExitStack() as stack:
                for path, numbers in gone.items():
                    parent = path.rpartition(".")[0]
                    experts, router = model.get_submodule(path), model.get_submodule(f"{parent}.gate")
                    if answer == "next":
                        stack.callback(router.register_forward_hook(_rerouted(numbers)).remove)
                    stack.callback(experts.register_forward_pre_hook(_without(numbers, answer, chosen)).remove)
                quality = workload.measure(model)
            if answer == "nothing":
                found.append(f"{chosen['gone'] / chosen['all']:.1%}")
            found.append(f"{quality.kl:.4f} ± {quality.kl_standard_error:.4f}")
        print(*found, flush=True)
        rows.append(found)
    return rows


def _rerouted(gone: list[int]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A hook that makes a router choose among the other experts."""

    def hook(module: torch.nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits = output[0].clone()
        logits[:, gone] = -torch.inf
        weights, index = logits.softmax(-1).topk(output[2].shape[1], -1)
        return logits, weights / weights.sum(-1, keepdim=True) if module.norm_topk_prob else weights, index

    return hook


def _without(gone: list[int], answer: str, chosen: dict[str, int]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A hook that sets the weights of some experts of a layer to zero, and counts how often they were chosen."""

    def hook(module: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, index, weights = args
        lost = torch.isin(index, torch.tensor(gone))
        chosen["all"] += lost.numel()
        chosen["gone"] += int(lost.sum())
        left = weights.masked_fill(lost, 0)
        if answer == "others":
            left = left * (weights.sum(-1, keepdim=True) / left.sum(-1, keepdim=True).clamp_min(1e-9))
        return hidden, index, left

    return hook


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="three public shapes, and 60 steps of training")
    parser.add_argument("--write", action="store_true", help="write the tables to results/")
    parser.add_argument("--steps", type=int, default=500, help="steps of training (default: 500)")
    arguments = parser.parse_args()
    steps = 60 if arguments.quick else arguments.steps
    shares = []
    for kind in PUBLIC[:3] if arguments.quick else PUBLIC:
        fused, apart = reach(kind)
        shares.append([kind, f"{fused:.2%}", f"{apart:.2%}"])
        print(*shares[-1], flush=True)
    config = Config(device="cpu", calibration_tokens=8192, heldout_tokens=4096, search_text_tokens=512, shrinkage=0.05)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        byte_tokenizer().save_pretrained(folder)
        transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**SHAPE), trust_remote_code=False
        ).save_pretrained(folder)
        loaded, sites = open_model(config.model_copy(update={"model": str(folder)}), torch.device("cpu"))
        more = config.model_copy(update={"model": str(folder), "calibration_tokens": TRAINING})
        text = Experiment.of(more, loaded, sites, torch.device("cpu")).splits.calibration
        bytes_ = torch.tensor([token for row in text.prose for token in row])
        model, loss = trained(steps, bytes_)
        parameters = model_parameters(model)
        model.save_pretrained(folder)
        rows = compared(folder, config)
        without = left_out(folder, config)
    body = (
        "Share of the parameters inside the blocks that can be compressed, with experts fused as before and taken "
        f"apart, from shapes alone ({BLOCKS} blocks of each default configuration of transformers):\n\n"
        + markdown(["architecture", "experts fused", "experts taken apart"], shares)
        + f"\n\nKL of the closed form to a mixture of {parameters:,} parameters (8 experts in each of 3 blocks, 2 per "
        f"token), trained for {steps} steps on {len(bytes_):,} bytes to {loss:.2f} nats per byte, on held-out text, in "
        "nats per byte ± one standard error:\n\n"
        + markdown(["experts", *(f"kept {kept}" for kept in KEPT)], rows)
        + "\n\nThe same without the experts of least predicted cost in every layer, by what a token gets that was sent "
        "to one of them:\n\n"
        + markdown(["left out, of 8", "of all choices", "nothing", "its other experts", "the router's next"], without)
    )
    publish("benchmarks.experts", "Mixtures of experts", body, [], arguments.write)


if __name__ == "__main__":
    main()
