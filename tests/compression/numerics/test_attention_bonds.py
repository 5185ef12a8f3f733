"""The bonds inside attention heads: costs are those of the exact refit, nested, and free of cost at full width."""

from __future__ import annotations

import pytest
import torch

from compression.bonds import Bond, discover_bonds, linear_layer
from compression.numerics.attention_bonds import (
    cut_reader,
    cut_writer,
    eliminate_directions,
    eliminate_pairs,
    eliminate_score_directions,
    pair_rows,
    rotary_pairs,
)
from compression.numerics.elimination import eliminate, refit
from compression.sites import dense_weight, discover_sites
from search.model.loading import load_model

OUT, GROUPS, HEADS, SIZE = 7, 2, 3, 4  # heads per group
VALUES = GROUPS * HEADS * SIZE


def moment(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
    rows = rows * torch.linspace(0.3, 2.0, size, dtype=torch.float64)
    return rows.T @ rows / len(rows)


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, VALUES, generator=generator, dtype=torch.float64)
    return weight, moment(VALUES, seed + 1), moment(OUT, seed + 2)


def loss(error: torch.Tensor, inputs: torch.Tensor, gradients: torch.Tensor) -> float:
    return 0.5 * float((gradients @ error @ inputs * error).sum())


def spread(basis: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """The map from the values of all heads to the kept ones."""
    kept = [rows[:rank] for rows, rank in zip(basis, ranks.tolist(), strict=True)]
    return torch.block_diag(*(rows for rows in kept for _ in range(HEADS)))


@pytest.mark.parametrize("equal", [True, False])
def test_costs_of_all_widths_are_those_of_the_refitted_matrix(equal: bool) -> None:
    weight, inputs, gradients = case()
    found = eliminate_directions(weight, inputs, gradients, GROUPS, SIZE, equal)
    widths = SIZE if equal else GROUPS * SIZE
    assert found.ranks.sum(1).tolist() == [width * (GROUPS if equal else 1) for width in range(widths + 1)]
    assert (found.ranks.diff(dim=0) >= 0).all()
    assert (found.cost.diff() < 0).all()
    for ranks, cost in zip(found.ranks, found.cost, strict=True):
        chosen = spread(found.basis, ranks)
        error = weight - cut_reader(weight, inputs, found.basis, ranks) @ chosen
        assert float(cost) == pytest.approx(loss(error, inputs, gradients), rel=1e-9, abs=1e-12)
        if 0 < len(chosen) < VALUES:  # the refit is a minimum: the error left is not correlated with what is read
            assert (error @ inputs @ chosen.T).abs().max() < 1e-9


def test_the_basis_is_orthogonal_and_the_full_width_costs_nothing() -> None:
    weight, inputs, gradients = case()
    found = eliminate_directions(weight, inputs, gradients, GROUPS, SIZE)
    eye = torch.eye(SIZE, dtype=torch.float64).expand(GROUPS, -1, -1)
    torch.testing.assert_close(found.basis @ found.basis.mT, eye)
    assert float(found.cost[-1]) == 0
    torch.testing.assert_close(
        cut_reader(weight, inputs, found.basis, found.ranks[-1]) @ spread(found.basis, found.ranks[-1]), weight
    )


def test_with_one_head_the_first_direction_is_the_cheapest_there_is() -> None:
    """Without other heads, the best rank d − 1 is known: the truncated SVD of the whitened matrix."""
    weight, inputs, gradients = case()
    found = eliminate_directions(weight, inputs, gradients, 1, VALUES)
    white = torch.linalg.cholesky(gradients).T @ weight @ torch.linalg.cholesky(inputs)
    tail = 0.5 * torch.linalg.svdvals(white).square().flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(found.cost[:OUT], tail)
    assert (found.cost[OUT:] < 1e-12).all()


def test_no_other_direction_of_a_shared_basis_is_much_cheaper() -> None:
    weight, inputs, gradients = case()
    least = float(eliminate_directions(weight, inputs, gradients, 1, SIZE * GROUPS).cost[-2])
    inverse, generator = torch.linalg.inv(inputs), torch.Generator().manual_seed(0)
    for direction in torch.randn(2000, SIZE * GROUPS, generator=generator, dtype=torch.float64):
        blocks = torch.kron(torch.eye(HEADS, dtype=torch.float64), direction[:, None])
        columns = weight @ blocks
        solved = torch.linalg.solve(blocks.T @ inverse @ blocks, columns.T @ gradients @ columns)
        assert 0.5 * float(solved.trace()) > 0.98 * least


def test_directions_cost_less_than_coordinates_of_the_heads() -> None:
    weight, inputs, gradients = case()
    columns = torch.arange(VALUES).reshape(GROUPS * HEADS, SIZE).T.flatten()
    plain = eliminate(weight[:, columns], inputs[columns][:, columns], gradients, GROUPS * HEADS)
    found = eliminate_directions(weight, inputs, gradients, GROUPS, SIZE)
    assert (found.cost[1:-1] < plain.cost[1:-1]).all()


def test_free_ranks_follow_the_groups_that_matter() -> None:
    weight, inputs, gradients = case()
    weight[:, : VALUES // 2] *= 0.01
    found = eliminate_directions(weight, inputs, gradients, GROUPS, SIZE, equal=False)
    assert found.ranks[SIZE].tolist() == [0, SIZE]


def test_directions_of_scores_are_those_of_the_transposed_matrix_and_keep_the_scores() -> None:
    weight, inputs, gradients = case()
    found = eliminate_score_directions(weight.T, gradients, inputs, GROUPS, SIZE)
    for ranks, cost in zip(found.ranks, found.cost, strict=True):
        reader = cut_reader(weight, inputs, found.basis, ranks).T
        error = weight.T - spread(found.basis, ranks).T @ reader
        assert float(cost) == pytest.approx(loss(error, gradients, inputs), rel=1e-9, abs=1e-12)
    generator = torch.Generator().manual_seed(5)
    key, tokens = (torch.randn(size, OUT, generator=generator).double() for size in (GROUPS * SIZE, 5))
    made = cut_writer(key, found.basis, found.ranks[-1])
    scores = [
        torch.einsum("tghi,sgi->ghts", (tokens @ q.T).reshape(5, GROUPS, HEADS, -1), (tokens @ k.T).reshape(5, 2, -1))
        for q, k in ((weight.T, key), (reader, made))
    ]
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
def test_costs_of_pairs_are_those_of_the_refitted_queries(shared: bool, interleaved: bool) -> None:
    weight, inputs, gradients = case()
    query, pairs = weight.T, rotary_pairs(SIZE, interleaved)
    found = eliminate_pairs(query, gradients, inputs, GROUPS, pairs, shared)
    widths = len(pairs) * (1 if shared else GROUPS)
    assert len(found.order) == widths
    assert (found.cost.diff() < 0).all()
    for width in range(widths + 1):
        rows = pair_rows(pairs, found.kept(width), GROUPS * HEADS if shared else HEADS, shared)
        error = query.clone()
        if width:
            error[rows] -= refit(query.T, inputs, rows).T
        assert float(found.cost[width]) == pytest.approx(loss(error, gradients, inputs), rel=1e-9, abs=1e-12)


def test_pairs_of_rows_lie_where_the_layout_puts_them() -> None:
    assert rotary_pairs(6).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert rotary_pairs(6, interleaved=True).tolist() == [[0, 1], [2, 3], [4, 5]]
    kept = torch.tensor([0, 3])
    assert pair_rows(rotary_pairs(4), kept[:1], 2).tolist() == [0, 2, 4, 6]
    assert pair_rows(rotary_pairs(4), kept, 1, shared=False).tolist() == [0, 2, 5, 7]
    assert pair_rows(rotary_pairs(4), kept, 2, shared=False).tolist() == [0, 2, 4, 6, 9, 11, 13, 15]


@pytest.mark.parametrize("name", ["random:tiny-llama", "random:tiny-qwen2"])  # the second has biases
def test_a_new_basis_for_values_leaves_the_model_as_it_was(name: str) -> None:
    model = load_model(name, "cpu").model.double()
    bond = heads_of(model)
    value, output = (model.get_submodule(site) for site in (bond.writers[2], bond.reader))
    generator = torch.Generator().manual_seed(0)
    if value.bias is not None:
        value.bias.copy_(torch.randn(value.bias.shape, generator=generator))
    ids = torch.arange(12)[None]
    before = model(input_ids=ids, use_cache=False).logits
    weight = dense_weight(output)
    inputs, gradients = moment(weight.shape[1], 1), moment(len(weight), 2)
    found = eliminate_directions(weight, inputs, gradients, bond.groups, bond.rows[2])
    full = found.ranks[-1]
    bias = None if value.bias is None else cut_writer(value.bias, found.basis, full)
    model.set_submodule(bond.writers[2], linear_layer(cut_writer(dense_weight(value), found.basis, full), bias))
    assert (model(input_ids=ids, use_cache=False).logits - before).abs().max() > 1e-9  # v alone is not enough
    model.set_submodule(bond.reader, linear_layer(cut_reader(weight, inputs, found.basis, full), output.bias))
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, before, atol=1e-10, rtol=1e-10)


def test_pairs_removed_from_q_from_k_or_from_both_have_the_same_effect() -> None:
    model = load_model("random:tiny-llama", "cpu").model.double()
    bond = heads_of(model)
    pairs, ids, outputs = rotary_pairs(bond.rows[1]), torch.arange(12)[None], []
    dense = {site: model.get_submodule(site) for site in bond.writers[:2]}
    whole = model(input_ids=ids, use_cache=False).logits
    for chosen in ([0], [1], [0, 1]):
        for number in (0, 1):
            site, size = bond.writers[number], bond.rows[1]
            weight = dense_weight(dense[site]).clone()
            weight[pair_rows(pairs, torch.tensor([0, 2]), len(weight) // size)] = 0
            model.set_submodule(site, linear_layer(weight, None) if number in chosen else dense[site])
        outputs.append(model(input_ids=ids, use_cache=False).logits)
    assert (outputs[0] - whole).abs().max() > 1e-9
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(outputs[2], outputs[0], atol=1e-12, rtol=1e-12)


def test_a_matrix_of_zeros_costs_nothing() -> None:
    weight, inputs, gradients = case()
    found = eliminate_directions(0 * weight, inputs, gradients, GROUPS, SIZE)
    assert (found.cost == 0).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inputs": torch.eye(3)}, "needs moments of 24 and 7 values"),
        ({"groups": 5}, "5 groups of heads of 4 values must divide the 24 values"),
        ({"groups": 0}, "0 groups of heads"),
        ({"inputs": torch.zeros(VALUES, VALUES)}, "not positive definite"),
        ({"gradients": torch.zeros(OUT, OUT)}, "not positive definite"),
    ],
)
def test_what_cannot_be_eliminated_is_refused(changes: dict, said: str) -> None:
    weight, inputs, gradients = case()
    given = {"weight": weight, "inputs": inputs, "gradients": gradients, "groups": GROUPS, "size": SIZE} | changes
    with pytest.raises(ValueError, match=said) as caught:
        eliminate_directions(**given)
    assert "\n" not in str(caught.value)


def test_wrong_ranks_rows_and_sizes_are_refused() -> None:
    weight, inputs, gradients = case()
    basis = eliminate_directions(weight, inputs, gradients, GROUPS, SIZE).basis
    with pytest.raises(ValueError, match="2 groups need as many ranks between 0 and 4, got \\[5, 1\\]"):
        cut_reader(weight, inputs, basis, torch.tensor([5, 1]))
    with pytest.raises(ValueError, match="2 groups need as many ranks"):
        cut_writer(torch.zeros(8, 3), basis, torch.tensor([1]))
    with pytest.raises(ValueError, match="the bond has 8 values, got 9 rows"):
        cut_writer(torch.zeros(9, 3), basis, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="heads of an even size, got 5"):
        rotary_pairs(5)
    with pytest.raises(ValueError, match="needs moments of 24 and 7 values"):
        eliminate_pairs(weight.T, gradients, torch.eye(3), GROUPS, rotary_pairs(SIZE))


def heads_of(model: torch.nn.Module) -> Bond:
    """The bond of the heads of block 1, which is found in float32."""
    found = discover_bonds(model.float(), discover_sites(model))
    model.double()
    return next(bond for bond in found if bond.kind == "heads" and bond.block == 1)
