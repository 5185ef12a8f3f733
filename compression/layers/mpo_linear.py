"""Defines `MPOLinear`, a linear layer whose matrix is stored as MPO cores.

Knows tensors and modules; does not know where the cores come from or what a route costs on this machine (see
`compression.layers.planner`). It does not subclass `nn.Linear`, so tools that replace linear layers by type do not
touch it and the cores are not lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn import functional

from compression.layers.routes import Plan, Route, default_plan, formed_quickly, in_training, is_lowrank
from compression.numerics.cores import contract, contract_with
from compression.numerics.gauge import PivotedCore
from compression.numerics.legs import Legs
from compression.numerics.pivoted_product import padded, pivoted_product, row_order, unfolding
from compression.numerics.products import rounds_products
from compression.refusal import Refusal

__all__ = ["MPOLinear"]

_Value = TypeVar("_Value")


class _Kept(NamedTuple):
    """Holds a value derived from stored tensors, and what is needed to check that these have not changed."""

    value: Any
    # Parameters or buffers, the name in them, the tensor, its address and version.
    sources: list[tuple[dict[str, Any], str, torch.Tensor, int, int]]
    storages: list[torch.Tensor]  # keep the memory alive, so that equal addresses mean the same memory

    def holds(self) -> bool:
        """Whether the source tensors are still the stored ones, have not been written to, and need no gradients."""
        for holder, key, source, address, version in self.sources:
            if holder[key] is not source or source._version != version or source.data_ptr() != address:
                return False
            if source.requires_grad:
                return False
        return True


class MPOLinear(nn.Module):
    """Computes y = Ŵ x + b with Ŵ (out, in) given by cores (left, out, in, right).

    The state dict contains the bias, if any, and either plain cores `core_0`, … or the pivoted form. The pivoted form
    has, for every core but the last, the rows other than its identity, `tail_0`, …, and the row indices of the
    identity, `places_0`, … (int32); the last core is plain. All parameters are created without gradients; enable them
    with `requires_grad_`.

    Every route of the plan uses the same matrix. Tensors that a route keeps in addition to the stored ones are built on
    first use, rebuilt after a stored tensor has changed, and not used while a stored tensor requires gradients. A
    compiled graph detects all of this except writes into a core that does not require gradients; call `prepare` after
    such writes.

    Args:
        cores: at least two cores. Neighbouring bonds must be equal, and 1 at both ends. Plain tensors are kept as given
            (views stay views). If any core is a `PivotedCore`, all but the last must be.
        bias: (out,) or None.
        plan: the route for every number of tokens; None uses the routes of least estimated cost that keep nothing
            besides the stored tensors.

    Raises:
        ValueError: bonds do not match, or some cores are pivoted but not exactly all except the last.
    """

    def __init__(
        self, cores: Sequence[torch.Tensor | PivotedCore], bias: torch.Tensor | None = None, plan: Plan | None = None
    ) -> None:
        super().__init__()
        bonds = [(core.shape[0], core.shape[3]) for core in cores]
        matched = all(left[1] == right[0] for left, right in pairwise(bonds))
        if len(cores) < 2 or bonds[0][0] != 1 or bonds[-1][1] != 1 or not matched:
            raise Refusal(f"two or more cores are needed, whose bonds must match and end in 1, got bonds {bonds}")
        pivoted = [isinstance(core, PivotedCore) for core in cores]
        if any(pivoted) and pivoted != [True] * (len(cores) - 1) + [False]:
            raise Refusal("either all cores but the last must be pivoted, or none")
        for number, core in enumerate(cores):
            if isinstance(core, PivotedCore):
                places, tail = _stored_form(core)
                self.register_parameter(f"tail_{number}", nn.Parameter(tail, requires_grad=False))
                self.register_buffer(f"places_{number}", places)
            else:
                self.register_parameter(f"core_{number}", nn.Parameter(core, requires_grad=False))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        shapes = [tuple(core.shape) for core in cores]
        self._shapes: list[tuple[int, ...]] = shapes
        self.legs = Legs(tuple(shape[1] for shape in shapes), tuple(shape[2] for shape in shapes), any(pivoted))
        self._lowrank = is_lowrank(self.legs)
        self.chi = max(bond for bond, _ in bonds[1:])
        self.out_features, self.in_features = prod(self.legs.out_legs), prod(self.legs.in_legs)
        self._stored = tuple(name for name in self.state_dict() if name != "bias")
        self._kept: dict[str, _Kept] = {}
        self._plan = default_plan(self.legs, self.chi) if plan is None else plan
        self._chosen = self._plan != default_plan(self.legs, self.chi)
        self.register_load_state_dict_post_hook(_prepare_after_loading)  # type: ignore[no-untyped-call]

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        """Maps (…, in) to (…, out)."""
        tokens, reduced = activations.numel() // self.in_features, self._is_reduced()
        if torch.is_grad_enabled() and tokens > 1 and self._is_trained():
            route = in_training(self.legs, self.chi, tokens, activations.is_cuda, reduced)
            if route is not None:
                for stale in ("merged", "padded"):  # a compiled graph would not notice that they are outdated
                    self._kept.pop(stale, None)
                return self.run(activations, route)
            return self.run(activations, self._plan.route(tokens))
        route = self._plan.route(tokens)
        if reduced and not self._chosen and formed_quickly(self.legs, self.chi, tokens):
            route = "rebuild"
        return self.run(activations, route)

    def run(self, activations: torch.Tensor, route: Route) -> torch.Tensor:
        """Computes `forward` by a given route of `compression.layers.routes.routes(legs)` instead of the plan's."""
        bias = self._parameters["bias"]
        if route == "merged":
            return functional.linear(activations, self._merged(), bias)
        if route in ("pivoted", "transposed"):
            last, tail = self._factors()
            result = pivoted_product(activations, last, tail, self._order(0), route == "transposed")
            return result if bias is None else result + bias
        if route == "rebuild":
            return functional.linear(activations, self.weight, bias)
        if route == "padded":
            last, tail = self._padded()
            order = self._order(0)[1]
            result = pivoted_product(activations, last, tail, (order, order), transposed=False)
            return result if bias is None else result + bias
        cores = self._expanded() if route.startswith("expanded") else self.cores
        if self._lowrank and route.endswith("last"):
            inner = functional.linear(activations, cores[1].flatten(1))
            return functional.linear(inner, cores[0].flatten(0, 2), bias)
        result = contract_with(cores, activations.reshape(-1, self.in_features), last_first=route.endswith("last"))
        result = result.reshape(*activations.shape[:-1], self.out_features)
        return result if bias is None else result + bias

    @property
    def plan(self) -> Plan:
        """The route for every number of tokens."""
        return self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._plan, self._chosen = plan, plan != default_plan(self.legs, self.chi)
        self.prepare()

    def prepare(self) -> None:
        """Rebuild the tensors that the plan keeps in addition to the stored ones, and drop all others."""
        self._kept.clear()
        if self._plan.used & {"pivoted", "transposed", "padded"}:
            self._order(0)
        if "padded" in self._plan.used:
            self._padded()
        if self._plan.used & {"expanded-first", "expanded-last"}:
            self._expanded()
        if "merged" in self._plan.used:
            self._merged()

    @property
    def has_latent(self) -> bool:
        """Whether χ of the outputs determine all others, which is the case for pivoted low rank."""
        return self._lowrank and self.legs.pivoted

    def latent(self, outputs: torch.Tensor) -> torch.Tensor:
        """Selects the outputs that determine all others, (…, out) to (…, χ). Requires `has_latent`."""
        places: torch.Tensor = self.get_buffer("places_0")
        return outputs.index_select(-1, places.long())

    def outputs(self, latent: torch.Tensor) -> torch.Tensor:
        """Computes all outputs from those that `latent` selected, (…, χ) to (…, out). Requires `has_latent`."""
        bias = self._parameters["bias"]
        copied = latent if bias is None else latent - self.latent(bias)
        unordered = torch.cat((copied, functional.linear(copied, self._factors()[1])), dim=-1)
        result = unordered.index_select(-1, self._order(0)[0])
        return result if bias is None else result + bias

    @property
    def bonds(self) -> tuple[int, ...]:
        """Bond dimensions between the cores."""
        return tuple(shape[0] for shape in self._shapes[1:])

    @property
    def cores(self) -> list[torch.Tensor]:
        """The plain cores (left, out, in, right); computed on every access if they are stored pivoted."""
        last = len(self._shapes) - 1
        return [self._core(number) for number in range(last)] + [getattr(self, f"core_{last}")]

    @property
    def weight(self) -> torch.Tensor:
        """The dense matrix (out, in), computed on every access; for code that reads the weight of a layer."""
        if not (self._lowrank and self.legs.pivoted):
            return contract(self.cores)
        last, tail = self._factors()
        if self._is_reduced():
            with torch.autocast("cpu", enabled=False):
                below = torch.mm(tail.float(), last.float()).to(last.dtype)
        else:
            below = torch.mm(tail, last)
        return torch.cat((last, below)).index_select(0, self._order(0)[0])

    @property
    def resident_bytes(self) -> int:
        """Bytes of the stored tensors and of all tensors kept in addition."""
        values = [kept.value for kept in self._kept.values()]
        kept = [tensor for value in values for tensor in ([value] if isinstance(value, torch.Tensor) else value)]
        own = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers(), *kept)}
        return sum(tensor.numel() * tensor.element_size() for tensor in own.values())

    def extra_repr(self) -> str:
        form = ", pivoted" if self.legs.pivoted else ""
        return f"out={self.legs.out_legs}, in={self.legs.in_legs}, chi={self.chi}{form}, bias={self.bias is not None}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MPOLinear:
        self._kept.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _is_reduced(self) -> bool:
        """Whether a CPU multiplies 16-bit numbers here, for which it compiles a kernel for every shape."""
        if torch.compiler.is_compiling():
            return False
        core = getattr(self, f"core_{len(self._shapes) - 1}")
        return rounds_products(core) or (core.device.type == "cpu" and torch.is_autocast_enabled("cpu"))

    def _is_trained(self) -> bool:
        parameters: Any = self._parameters
        return any(parameters[name].requires_grad for name in self._stored if name in parameters)

    def _core(self, number: int) -> torch.Tensor:
        """Returns core `number`, which must not be the last one, as a plain tensor."""
        if not self.legs.pivoted:
            core: torch.Tensor = getattr(self, f"core_{number}")
            return core
        tail: torch.Tensor = getattr(self, f"tail_{number}")
        return unfolding(tail, self._order(number)).reshape(self._shapes[number])

    def _merged(self) -> torch.Tensor:
        return self._keep("merged", self._stored, lambda: self.weight.contiguous())

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns B and T of `pivoted_product`."""
        parameters: Any = self._parameters
        return parameters["core_1"].view(self.chi, self.in_features), parameters["tail_0"]

    def _padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns B and T of `pivoted_product`, with zeros that round χ up to a multiple of 16."""

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            last, tail = self._factors()
            zeros = padded(self.chi) - self.chi
            return functional.pad(last, (0, 0, 0, zeros)), functional.pad(tail, (0, zeros))

        return self._keep("padded", self._stored, make)

    def _expanded(self) -> list[torch.Tensor]:
        last = len(self._shapes) - 1
        inner = self._keep("expanded", self._stored, lambda: [self._core(number) for number in range(last)])
        return [*inner, getattr(self, f"core_{last}")]

    def _order(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the positions of the rows of core `number`'s left unfolding, see `row_order`."""
        name = f"places_{number}"
        return self._keep(name, (name,), lambda: row_order(getattr(self, name), prod(self._shapes[number][:3])))

    def _keep(self, name: str, stored: Sequence[str], make: Callable[[], _Value]) -> _Value:
        """Returns the result of `make`, which uses the named stored tensors; keeps it until one of them changes."""
        kept = self._kept.get(name)
        if torch.compiler.is_compiling():
            if any(getattr(self, key).requires_grad for key in stored):
                self._kept.pop(name, None)
                return make()
            return make() if kept is None else kept.value
        if kept is not None and kept.holds():
            value: _Value = kept.value
            return value
        self._kept.pop(name, None)
        tensors: list[torch.Tensor] = [getattr(self, key) for key in stored]
        # An inference tensor has no version counter, so writes to it would go unnoticed.
        if any(tensor.requires_grad or tensor.is_inference() for tensor in tensors):
            return make()
        # Leave inference mode if called from within it: the value may later serve a call that needs gradients.
        with torch.inference_mode(False), torch.no_grad():
            value = make()
        parameters: dict[str, Any] = self._parameters
        sources = [
            (parameters if key in parameters else self._buffers, key, tensor, tensor.data_ptr(), tensor._version)
            for key, tensor in zip(stored, tensors, strict=True)
        ]
        self._kept[name] = _Kept(value, sources, [tensor.detach() for tensor in tensors])
        return value


def _prepare_after_loading(module: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(module, MPOLinear)
    module.prepare()


def _stored_form(core: PivotedCore) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the row indices of the identity, (χ,) int32, and the tail with its rows in ascending order of index."""
    chi = core.shape[3]
    origin = core.order.argsort()
    return origin[:chi].to(torch.int32), core.tail[origin[chi:].argsort()]
