"""`MlpProjector`: from the vision towers' width to the language model's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from deepseek_vl.checkpoints.attrdict_import import AttrDict
from deepseek_vl.models.projector import MlpProjector

SPLIT = "low_high_hybrid_split_mlp_gelu"


def projector(projector_type: str, **params: Any) -> MlpProjector:
    torch.manual_seed(0)
    return MlpProjector(AttrDict({"projector_type": projector_type, "input_dim": 6, "n_embed": 8, **params}))


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


@pytest.mark.parametrize(
    ("projector_type", "params", "expected"),
    [
        ("identity", {}, {}),
        ("linear", {}, linear("layers", 8, 6)),
        ("linear", {"depth": 3}, linear("layers", 8, 6)),
        ("mlp_gelu", {}, linear("layers.0", 8, 6)),
        ("mlp_gelu", {"depth": 1}, linear("layers.0", 8, 6)),
        ("mlp_gelu", {"depth": 2}, {**linear("layers.0", 8, 6), **linear("layers.2", 8, 8)}),
        (
            "mlp_gelu",
            {"depth": 3},
            {**linear("layers.0", 8, 6), **linear("layers.2", 8, 8), **linear("layers.4", 8, 8)},
        ),
        (SPLIT, {}, {**linear("high_up_proj", 4, 6), **linear("low_up_proj", 4, 6)}),
        (SPLIT, {"depth": 1}, {**linear("high_up_proj", 4, 6), **linear("low_up_proj", 4, 6)}),
        (
            SPLIT,
            {"depth": 3},
            {
                **linear("high_up_proj", 4, 6),
                **linear("low_up_proj", 4, 6),
                **linear("layers.1", 8, 8),
                **linear("layers.3", 8, 8),
            },
        ),
    ],
)
def test_parameter_names_and_shapes_follow_type_and_depth(projector_type, params, expected):
    """Names and shapes are those of checkpoints. `depth` is the number of consecutive linear layers, 1 by default."""
    assert shapes(projector(projector_type, **params)) == expected


def exact_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def test_identity_returns_the_features():
    x = torch.randn(2, 5, 6)
    assert torch.equal(projector("identity")(x), x)


def test_linear_is_one_linear_layer():
    module, x = projector("linear"), torch.randn(2, 5, 6)
    torch.testing.assert_close(module(x), x @ module.layers.weight.T + module.layers.bias)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_mlp_gelu_is_linear_then_gelu_and_linear(depth):
    module, x = projector("mlp_gelu", depth=depth), torch.randn(2, 5, 6)
    weights = module.state_dict()
    expected = F.linear(x, weights["layers.0.weight"], weights["layers.0.bias"])
    for i in range(1, depth):
        expected = F.linear(exact_gelu(expected), weights[f"layers.{2 * i}.weight"], weights[f"layers.{2 * i}.bias"])
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_split_projects_a_pair_to_half_the_width_each_high_first(depth):
    module = projector(SPLIT, depth=depth)
    high, low = torch.randn(2, 2, 5, 6)
    weights = module.state_dict()
    expected = torch.cat(
        [
            F.linear(high, weights["high_up_proj.weight"], weights["high_up_proj.bias"]),
            F.linear(low, weights["low_up_proj.weight"], weights["low_up_proj.bias"]),
        ],
        dim=-1,
    )
    for i in range(1, depth):
        name = f"layers.{2 * i - 1}"
        expected = F.linear(exact_gelu(expected), weights[f"{name}.weight"], weights[f"{name}.bias"])
    output = module((high, low))
    assert output.shape == (2, 5, 8)
    torch.testing.assert_close(output, expected)


def test_an_unknown_type_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="'mlp_relu'"):
        projector("mlp_relu")


@pytest.mark.parametrize("projector_type", ["identity", "linear", "mlp_gelu"])
def test_a_pair_given_to_a_type_for_one_tensor_is_an_error_that_names_the_type(projector_type):
    with pytest.raises(ValueError, match=projector_type):
        projector(projector_type)((torch.randn(1, 5, 6), torch.randn(1, 5, 6)))
