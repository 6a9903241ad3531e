"""The vision towers SigLIP, SAM, CLIP and the hybrid of two, at small sizes."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_config
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from deepseek_vl.kernels import positions
from deepseek_vl.models.clip_encoder import CLIPVisionTower, HybridVisionTower
from deepseek_vl.models.sam import create_sam_vit
from deepseek_vl.models.siglip_vit import create_siglip_vit

SIGLIP = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "heads": 2}
SAM = {
    "image_size": 64,
    "patch_size": 8,
    "width": 32,
    "layers": 3,
    "heads": 2,
    "global_attn_indexes": (1, 2),
    "window_size": 3,
    "prompt_embed_dim": 16,
    "downsample_channels": (32, 48),
    "neck_size": 16,
}
LOW = {"model_name": "siglip_large_patch16_384", "select_layer": -1, "output_dim": 48, **SIGLIP}
HIGH = {"model_name": "sam_b_downsample", "output_dim": 48, **{k: v for k, v in SAM.items() if k != "neck_size"}}


def randomized(tower: nn.Module, scale: float = 0.2) -> nn.Module:
    """A tower in eval mode with noise on all parameters: SAM's relative positions and second neck start as zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return tower.eval()


def images(size: int, count: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def small_siglip(**overrides: Any) -> nn.Module:
    return randomized(create_siglip_vit("siglip_large_patch16_384", **{**SIGLIP, **overrides}))


def small_sam(model_name: str = "sam_b_downsample", **overrides: Any) -> nn.Module:
    return randomized(create_sam_vit(model_name, **{**SAM, **overrides}))


# --- the tables ---


@pytest.mark.parametrize(
    ("model_name", "patch", "width", "layers", "heads", "hidden"),
    [
        ("siglip_so400m_patch14_384", 14, 1152, 27, 16, 4304),
        ("siglip_so400m_patch14_224", 14, 1152, 27, 16, 4304),
        ("siglip_large_patch16_384", 16, 1024, 24, 16, 4096),
    ],
)
def test_siglip_variants_have_the_published_sizes(model_name, patch, width, layers, heads, hidden):
    with torch.device("meta"):
        tower = create_siglip_vit(model_name)
    assert tower.patch_embed.proj.weight.shape == (width, 3, patch, patch)
    assert tower.pos_embed.shape == (1, (384 // patch) ** 2, width)  # 384 px by default, whatever size the name has
    assert len(tower.blocks) == layers
    block = tower.blocks[0]
    assert block.attn.num_heads == heads
    assert block.attn.qkv.weight.shape == (3 * width, width)
    assert block.mlp.fc1.weight.shape == (hidden, width)
    assert {m.eps for m in tower.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert tower.attn_pool.latent.shape == (1, 1, width)  # the unused head is kept, so that checkpoints load strictly


@pytest.mark.parametrize(
    ("model_name", "width", "layers", "heads", "global_blocks", "downsamples"),
    [
        ("sam_vit_b", 768, 12, 12, [2, 5, 8, 11], []),
        ("sam_b_downsample", 768, 12, 12, [2, 5, 8, 11], [(512, 256, 3, 3), (1024, 512, 3, 3)]),
        ("sam_vit_l", 1024, 24, 16, [5, 11, 17, 23], []),
        ("sam_vit_h", 1280, 32, 16, [7, 15, 23, 31], []),
    ],
)
def test_sam_variants_have_the_published_sizes(model_name, width, layers, heads, global_blocks, downsamples):
    with torch.device("meta"):
        tower = create_sam_vit(model_name)
    state = {name: tuple(value.shape) for name, value in tower.state_dict().items()}
    assert state["patch_embed.proj.weight"] == (width, 3, 16, 16)
    assert state["pos_embed"] == (1, 64, 64, width)
    assert len(tower.blocks) == layers
    for i in range(layers):  # windows of 14 x 14, or the whole grid of 64 x 64
        side = 64 if i in global_blocks else 14
        assert state[f"blocks.{i}.attn.rel_pos_h"] == (2 * side - 1, width // heads)
        assert state[f"blocks.{i}.attn.rel_pos_w"] == (2 * side - 1, width // heads)
    assert state["blocks.0.mlp.lin1.weight"] == (4 * width, width)
    for neck in ("neck", "neck_hd"):
        assert state[f"{neck}.0.weight"] == (256, width, 1, 1)
        assert state[f"{neck}.2.weight"] == (256, 256, 3, 3)
        assert f"{neck}.0.bias" not in state
        assert f"{neck}.2.bias" not in state
    assert state["hd_alpha_downsamples"] == (1,)
    assert [(k, v) for k, v in state.items() if k.startswith("downsamples")] == [
        (f"downsamples.{i}.weight", shape) for i, shape in enumerate(downsamples)
    ]
    assert {m.eps for m in tower.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize(
    ("overrides", "parameter", "shape"),
    [
        ({"image_size": 64}, "pos_embed", (1, 64, 48)),
        ({"patch_size": 4}, "patch_embed.proj.weight", (48, 3, 4, 4)),
        ({"width": 64}, "blocks.2.attn.proj.weight", (64, 64)),
        ({"layers": 5}, "blocks.4.norm1.weight", (48,)),
        ({"mlp_ratio": 2.0}, "blocks.0.mlp.fc1.weight", (96, 48)),
    ],
)
def test_every_siglip_field_can_be_overridden(overrides, parameter, shape):
    assert small_siglip(**overrides).state_dict()[parameter].shape == shape


def test_siglip_heads_can_be_overridden():
    assert [block.attn.num_heads for block in small_siglip(heads=4).blocks] == [4, 4, 4]


@pytest.mark.parametrize(
    ("overrides", "parameter", "shape"),
    [
        ({"image_size": 32}, "pos_embed", (1, 4, 4, 32)),
        ({"patch_size": 16}, "patch_embed.proj.weight", (32, 3, 16, 16)),
        ({"width": 64}, "blocks.0.attn.qkv.weight", (192, 64)),
        ({"layers": 4}, "blocks.3.norm2.bias", (32,)),
        ({"heads": 4}, "blocks.0.attn.rel_pos_h", (5, 8)),
        ({"window_size": 5}, "blocks.0.attn.rel_pos_w", (9, 16)),
        ({"global_attn_indexes": [0]}, "blocks.0.attn.rel_pos_w", (15, 16)),
        ({"mlp_ratio": 2.0}, "blocks.0.mlp.lin1.weight", (64, 32)),
        ({"prompt_embed_dim": 8}, "neck_hd.2.weight", (8, 8, 3, 3)),
        ({"downsample_channels": [40]}, "downsamples.0.weight", (40, 16, 3, 3)),
    ],
)
def test_every_sam_field_can_be_overridden(overrides, parameter, shape):
    assert small_sam(**overrides).state_dict()[parameter].shape == shape


@pytest.mark.parametrize(
    ("create", "name"), [(create_siglip_vit, "siglip_huge_patch8_512"), (create_sam_vit, "sam_vit_z")]
)
@pytest.mark.parametrize("through_the_tower", [False, True])
def test_an_unknown_name_is_an_error_that_names_it(create, name, through_the_tower):
    with pytest.raises(ValueError, match=name):
        CLIPVisionTower(model_name=name) if through_the_tower else create(name)


@pytest.mark.parametrize(
    ("create", "name"), [(create_siglip_vit, "siglip_large_patch16_384"), (create_sam_vit, "sam_vit_b")]
)
@pytest.mark.parametrize("through_the_tower", [False, True])
def test_an_unknown_key_is_an_error_that_names_it(create, name, through_the_tower):
    with pytest.raises(ValueError, match="wdith"):
        CLIPVisionTower(model_name=name, wdith=64) if through_the_tower else create(name, wdith=64)


# --- SigLIP ---


@pytest.mark.parametrize(
    ("select_layer", "kept"), [(-1, 3), (-2, 2), (-3, 1), (0, 3), (1, 1), (2, 2), (3, 3), (4, 3), (100, 3)]
)
def test_siglip_select_layer_keeps_the_first_blocks_and_then_the_final_norm(select_layer, kept):
    whole = small_siglip()
    tower = create_siglip_vit("siglip_large_patch16_384", select_layer=select_layer, **SIGLIP).eval()
    assert len(tower.blocks) == kept
    tower.load_state_dict({k: v for k, v in whole.state_dict().items() if k in tower.state_dict()})
    x = images(32)
    with torch.no_grad():
        expected = whole.patch_embed(x) + whole.pos_embed
        for block in whole.blocks[:kept]:
            expected = block(expected)
        torch.testing.assert_close(tower(x), whole.norm(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers_below_the_first", [-5, -9])
def test_siglip_select_layer_before_the_first_block_is_an_error(layers_below_the_first):
    with pytest.raises(ValueError, match=str(layers_below_the_first)):
        create_siglip_vit("siglip_large_patch16_384", select_layer=layers_below_the_first, **SIGLIP)


@pytest.mark.parametrize(("image_size", "patches"), [(32, 16), (48, 36), (64, 64)])
def test_siglip_grid_follows_the_image_size(image_size, patches):
    tower = small_siglip(image_size=image_size)
    assert tower(images(image_size)).shape == (2, patches, 48)


def test_siglip_is_a_plain_pre_norm_transformer_with_exact_gelu():
    tower, x = small_siglip(), images(32)
    weights = tower.state_dict()

    def norm(name: str, y: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(y, (48,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    def linear(name: str, y: torch.Tensor) -> torch.Tensor:
        return F.linear(y, weights[f"{name}.weight"], weights[f"{name}.bias"])

    patches = x.reshape(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 192)
    y = patches @ weights["patch_embed.proj.weight"].reshape(48, 192).T + weights["patch_embed.proj.bias"]
    y = y + weights["pos_embed"]
    for i in range(3):
        q, k, v = (
            part.reshape(2, 16, 2, 24).transpose(1, 2)
            for part in linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", y)).chunk(3, dim=-1)
        )
        attended = torch.softmax(q @ k.mT / 24**0.5, dim=-1) @ v
        y = y + linear(f"blocks.{i}.attn.proj", attended.transpose(1, 2).reshape(2, 16, 48))
        hidden = linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", y))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        y = y + linear(f"blocks.{i}.mlp.fc2", hidden)
    torch.testing.assert_close(tower(x), norm("norm", y), rtol=0, atol=2e-5)


def test_siglip_with_its_head_gives_the_pooled_vector():
    features, pooled = small_siglip(), small_siglip(ignore_head=False)
    assert features.state_dict().keys() == pooled.state_dict().keys()
    x = images(32)
    assert features(x).shape == (2, 16, 48)
    assert pooled(x).shape == (2, 48)
    torch.testing.assert_close(pooled(x), pooled.attn_pool(features(x)), rtol=0, atol=1e-5)


# --- SAM ---


def plain_attention(attention: nn.Module, x: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention with the relative positions as an explicit [query, key] bias; [b, h, w, c] -> [b, h, w, c]."""
    b, h, w, c = x.shape
    q, k, v = (part.reshape(b, h * w, heads, c // heads).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1))
    bias = torch.zeros(b, heads, h * w, h * w)
    for query in range(h * w):
        for key in range(h * w):
            rows, columns = query // w - key // w, query % w - key % w
            position = attention.rel_pos_h[rows + h - 1] + attention.rel_pos_w[columns + w - 1]
            bias[:, :, query, key] = q[:, :, query] @ position  # the query is not scaled here
    weights = torch.softmax(q @ k.mT / (c // heads) ** 0.5 + bias, dim=-1)
    return attention.proj((weights @ v).transpose(1, 2).reshape(b, h, w, c))


def plain_block(block: nn.Module, x: torch.Tensor, heads: int, window: int) -> torch.Tensor:
    """One block of SAM; `window` 0 is global attention. Windows are cut from the map after norm and zero padding."""
    b, h, w, c = x.shape
    normed = F.layer_norm(x, (c,), block.norm1.weight, block.norm1.bias, eps=1e-6)
    size = window or h
    padded_side = -(-h // size) * size
    padded = torch.zeros(b, padded_side, padded_side, c)
    padded[:, :h, :w] = normed
    attended = torch.empty_like(padded)
    for top in range(0, padded_side, size):
        for left in range(0, padded_side, size):
            cut = (slice(None), slice(top, top + size), slice(left, left + size))
            attended[cut] = plain_attention(block.attn, padded[cut], heads)
    x = x + attended[:, :h, :w]
    hidden = block.mlp.lin1(F.layer_norm(x, (c,), block.norm2.weight, block.norm2.bias, eps=1e-6))
    return x + block.mlp.lin2(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)))


def plain_neck(neck: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """[b, h, w, c] -> [b, channels, h, w]: 1x1 conv, norm, 3x3 conv, norm over the channels."""

    def norm(layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
        y = y - y.mean(dim=1, keepdim=True)
        y = y / torch.sqrt(y.pow(2).mean(dim=1, keepdim=True) + 1e-6)
        return y * layer.weight[:, None, None] + layer.bias[:, None, None]

    y = norm(neck[1], F.conv2d(x.permute(0, 3, 1, 2), neck[0].weight))
    return norm(neck[3], F.conv2d(y, neck[2].weight, padding=1))


def plain_downsample(tower: nn.Module, x: torch.Tensor, neck_size: int) -> torch.Tensor:
    x = F.interpolate(x, size=(neck_size, neck_size), mode="bilinear", align_corners=False)
    for convolution in tower.downsamples:
        x = F.conv2d(x, convolution.weight, stride=2, padding=1)
    return x


def plain_blocks(tower: nn.Module, x: torch.Tensor, window: int, global_blocks: tuple[int, ...]) -> list[torch.Tensor]:
    """The output of every block, [b, h, w, c]."""
    y = F.conv2d(x, tower.patch_embed.proj.weight, tower.patch_embed.proj.bias, stride=8).permute(0, 2, 3, 1)
    y = y + tower.pos_embed
    outputs = []
    for i, block in enumerate(tower.blocks):
        y = plain_block(block, y, heads=2, window=0 if i in global_blocks else window)
        outputs.append(y)
    return outputs


@pytest.mark.parametrize(
    ("window", "grid"),
    [
        pytest.param(4, 8, id="whole windows"),
        pytest.param(3, 8, id="windows padded by one"),
        pytest.param(5, 8, id="windows padded by two"),
        pytest.param(10, 8, id="one window larger than the grid"),
        pytest.param(7, 7, id="window as large as the grid"),
    ],
)
@torch.no_grad()
def test_sam_blocks_equal_a_plain_implementation(window, grid):
    tower = small_sam(window_size=window, image_size=8 * grid)
    outputs: list[torch.Tensor] = []
    for block in tower.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    x = images(8 * grid)
    tower(x)
    for output, expected in zip(outputs, plain_blocks(tower, x, window, (1, 2)), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("global_blocks", [(1, 2), (2, 1), (0, 2), (2,)])
@torch.no_grad()
def test_sam_adds_the_second_neck_of_the_first_global_block(global_blocks):
    tower, x = small_sam(global_attn_indexes=global_blocks), images(64)
    outputs = plain_blocks(tower, x, 3, global_blocks)
    main = plain_downsample(tower, plain_neck(tower.neck, outputs[-1]), 16)
    branch = plain_downsample(tower, plain_neck(tower.neck_hd, outputs[min(global_blocks)]), 16)
    for alpha in (0.0, 0.5, -2.0):
        tower.hd_alpha_downsamples.fill_(alpha)
        torch.testing.assert_close(tower(x), main + alpha * branch, rtol=1e-4, atol=1e-4)
    assert branch.norm() > 0.1 * main.norm()  # large enough for the comparison above


@torch.no_grad()
def test_sam_with_zero_scale_has_no_second_neck():
    tower, x = small_sam(), images(64)
    tower.hd_alpha_downsamples.zero_()
    expected = tower(x)
    for parameter in tower.neck_hd.parameters():
        parameter.normal_()
    assert torch.equal(tower(x), expected)


def test_sam_needs_a_global_block():
    with pytest.raises(ValueError, match="global_attn_indexes"):
        small_sam(global_attn_indexes=(3,))


@pytest.mark.parametrize(
    ("model_name", "shape"),
    [
        ("sam_b_downsample", (1, 1024, 24, 24)),
        ("sam_vit_b", (1, 256, 96, 96)),
        ("sam_vit_l", (1, 256, 96, 96)),
        ("sam_vit_h", (1, 256, 96, 96)),
    ],
)
@torch.no_grad()
def test_sam_output_shape_is_the_published_one_whatever_the_trunk(model_name, shape):
    trunk = {"image_size": 64, "width": 32, "layers": 2, "heads": 2, "global_attn_indexes": (1,)}
    assert create_sam_vit(model_name, **trunk)(images(64, count=1)).shape == shape


@pytest.mark.parametrize(("neck_size", "channels", "side"), [(16, (32, 48), 4), (12, (32,), 6), (10, (), 10)])
@torch.no_grad()
def test_sam_resizes_the_neck_bilinearly_to_neck_size_before_downsampling(neck_size, channels, side):
    tower = small_sam(neck_size=neck_size, downsample_channels=channels)
    necks, resized = [], []
    tower.neck.register_forward_hook(lambda module, args, output: necks.append(output))
    tower.downsamples.register_forward_hook(lambda module, args, output: resized.append(args[0]))
    assert tower(images(64)).shape == (2, (16, *channels)[-1], side, side)
    # Bilinear with half-pixel centres and no antialiasing, written out.
    centres = ((torch.arange(neck_size) + 0.5) * 8 / neck_size - 0.5).clamp(min=0)
    below = centres.floor().long().clamp(max=7)
    above, weight = (below + 1).clamp(max=7), centres - below
    matrix = torch.zeros(neck_size, 8)
    matrix[torch.arange(neck_size), below] += 1 - weight
    matrix[torch.arange(neck_size), above] += weight
    torch.testing.assert_close(resized[0], matrix @ necks[0] @ matrix.T, rtol=0, atol=1e-5)


class ResizeDtypes(TorchDispatchMode):
    """Record the dtypes of bilinear resizes."""

    def __init__(self):
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "upsample_bilinear2d" in str(function):
            self.seen.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_sam_resizes_in_float32_in_whatever_dtype_it_runs(dtype):
    tower = small_sam().to(dtype)
    necks, resized = [], []
    tower.neck.register_forward_hook(lambda module, args, output: necks.append(output))
    tower.downsamples.register_forward_hook(lambda module, args, output: resized.append(args[0]))
    with ResizeDtypes() as dtypes:
        output = tower(images(64).to(dtype))
    assert output.dtype == dtype
    assert dtypes.seen == [torch.float32, torch.float32]
    expected = F.interpolate(necks[0].float(), size=(16, 16), mode="bilinear", align_corners=False).to(dtype)
    assert torch.equal(resized[0], expected)


def test_sam_refuses_images_of_another_size():
    with pytest.raises(ValueError, match=r"64x64.*\(48, 64\)"):
        small_sam()(torch.zeros(1, 3, 48, 64))


# --- CLIPVisionTower ---


def test_tower_defaults_are_the_reference_s():
    with torch.device("meta"):
        tower = CLIPVisionTower()
    assert tower.model_name == "siglip_large_patch16_384"
    assert tower.vision_tower.pos_embed.shape == (1, 21 * 21, 1024)  # 336 px
    assert (tower.select_layer, len(tower.vision_tower.blocks)) == (-2, 23)
    assert tower.select_layers is None
    assert tower.select_feature == "same"  # forced by the SigLIP name
    assert tower.pixel_mean is None
    assert tower.pixel_std is None


@pytest.mark.parametrize("select_feature", ["patch", "cls_patch", "same"])
@torch.no_grad()
def test_siglip_and_sam_towers_return_what_their_network_returns(select_feature):
    for config, size in ((LOW, 32), ({**HIGH, "neck_size": 16}, 64)):
        tower = randomized(CLIPVisionTower(**config, select_feature=select_feature))
        assert tower.select_feature == "same"
        x = images(size)
        assert torch.equal(tower(x), tower.vision_tower(x))


@pytest.mark.parametrize(
    ("mean", "std"),
    [(None, None), ([0.1, 0.2, 0.3], None), (None, [0.5, 0.6, 0.7]), ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])],
)
@torch.no_grad()
def test_pixels_are_normalised_only_if_both_mean_and_std_are_given(mean, std):
    tower = randomized(CLIPVisionTower(**LOW, pixel_mean=mean, pixel_std=std))
    x = images(32)
    expected = x
    if mean and std:
        expected = (x - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)
    assert torch.equal(tower(x), tower.vision_tower(expected))


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP vision model on disk: 3 layers, 16 px, 2 x 2 patches."""
    path = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    )
    randomized(CLIPVisionModel(config)).save_pretrained(path)
    return path


@pytest.mark.parametrize(("select_feature", "start"), [("patch", 1), ("cls_patch", 0), ("same", 0)])
@pytest.mark.parametrize("select_layer", [-2, -1, 0, 1])
@torch.no_grad()
def test_clip_tower_selects_layer_and_features_of_the_hidden_states(clip_path, select_feature, start, select_layer):
    clip = CLIPVisionModel.from_pretrained(clip_path).eval()
    tower = CLIPVisionTower(str(clip_path), select_feature=select_feature, select_layer=select_layer).eval()
    x = images(16)
    expected = clip(x, output_hidden_states=True).hidden_states[select_layer][:, start:]
    assert expected.shape == (2, 5 - start, 32)
    assert torch.equal(tower(x), expected)


@torch.no_grad()
def test_clip_tower_takes_patches_of_the_last_but_one_layer_by_default_and_normalises(clip_path):
    clip = CLIPVisionModel.from_pretrained(clip_path).eval()
    tower = CLIPVisionTower(str(clip_path), pixel_mean=[0.5] * 3, pixel_std=[0.25] * 3).eval()
    x = images(16)
    expected = clip((x - 0.5) / 0.25, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(tower(x), expected)


@pytest.mark.parametrize("select_feature", ["patches", "", "cls"])
def test_clip_tower_refuses_other_features(clip_path, select_feature):
    with pytest.raises(ValueError, match=f"'{select_feature}'"):
        CLIPVisionTower(str(clip_path), select_feature=select_feature)(images(16))


def test_clip_tower_loads_ckpt_path(clip_path, tmp_path):
    torch.manual_seed(5)
    other = CLIPVisionModel(CLIPVisionConfig.from_pretrained(clip_path))
    torch.save(other.state_dict(), tmp_path / "other.pth")
    tower = CLIPVisionTower(str(clip_path), ckpt_path=str(tmp_path / "other.pth"))
    assert_same_weights(tower.vision_tower, other.state_dict())


# --- HybridVisionTower ---


def small_hybrid(high: dict[str, Any] | None = None, low: dict[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    return randomized(HybridVisionTower({**HIGH, **(high or {})}, {**LOW, **(low or {})}, **kwargs))


@pytest.mark.parametrize("concat_type", ["feature", "sequence", "add", "tuple", None])
@torch.no_grad()
def test_hybrid_combines_high_and_low_features_as_concat_type_says(concat_type):
    tower = small_hybrid(**({"concat_type": concat_type} if concat_type else {}))
    assert tower.concat_type == (concat_type or "tuple")
    x = images(64)
    high = tower.vision_tower_high(x).reshape(2, 48, 16).transpose(1, 2)  # row-major tokens
    low = tower.vision_tower_low(F.interpolate(x, size=(32, 32), mode="bilinear", antialias=True))
    assert high.shape == low.shape == (2, 16, 48)
    output = tower(x)
    if concat_type == "feature":
        assert output.shape == (2, 16, 96)
        assert torch.equal(output[..., :48], high)
        assert torch.equal(output[..., 48:], low)
    elif concat_type == "sequence":
        assert output.shape == (2, 32, 48)
        assert torch.equal(output[:, :16], high)
        assert torch.equal(output[:, 16:], low)
    elif concat_type == "add":
        assert torch.equal(output, high + low)
    else:
        assert isinstance(output, tuple)
        assert len(output) == 2
        assert torch.equal(output[0], high)
        assert torch.equal(output[1], low)


def test_hybrid_refuses_another_concat_type():
    with pytest.raises(ValueError, match="'stack'"):
        small_hybrid(concat_type="stack")


def test_hybrid_has_the_reference_s_attributes():
    tower = small_hybrid()
    assert isinstance(tower.vision_tower_high, CLIPVisionTower)
    assert isinstance(tower.vision_tower_low, CLIPVisionTower)
    assert tower.low_res_size == 32
    assert tower.concat_type == "tuple"
    assert sorted({name.split(".")[0] for name in tower.state_dict()}) == [
        "high_layer_norm",
        "low_layer_norm",
        "vision_tower_high",
        "vision_tower_low",
    ]


@pytest.mark.parametrize(("output_dim", "width"), [(48, 48), (7, 7), (None, 1024)])
def test_hybrid_layer_norms_are_output_dim_or_1024_wide_and_unused(output_dim, width):
    high, low = dict(HIGH), dict(LOW)
    for config in (high, low):
        del config["output_dim"]
        if output_dim:
            config["output_dim"] = output_dim
    tower = randomized(HybridVisionTower(high, low))
    for norm in (tower.high_layer_norm, tower.low_layer_norm):
        assert norm.normalized_shape == (width,)
        assert norm.eps == 1e-5
    x = images(64)
    expected = tower(x)
    torch.nn.init.zeros_(tower.high_layer_norm.weight)
    torch.nn.init.zeros_(tower.low_layer_norm.weight)
    assert all(torch.equal(a, b) for a, b in zip(tower(x), expected, strict=True))


@pytest.mark.parametrize("freeze_high", [False, True])
@pytest.mark.parametrize("freeze_low", [False, True])
def test_hybrid_freezes_towers_and_always_the_high_tower_s_trunk(freeze_high, freeze_low):
    """Parameters that the forward pass does not use, the norms and SigLIP's pooling, are always frozen as well."""
    tower = small_hybrid(freeze_high=freeze_high, freeze_low=freeze_low)
    trained = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    expected: set[str] = set()
    if not freeze_high:
        expected |= {
            f"vision_tower_high.vision_tower.{name}"
            for name in (
                *(f"{neck}.{i}.weight" for neck in ("neck", "neck_hd") for i in range(4)),
                *(f"{neck}.{i}.bias" for neck in ("neck", "neck_hd") for i in (1, 3)),
                "downsamples.0.weight",
                "downsamples.1.weight",
                "hd_alpha_downsamples",
            )
        }
    if not freeze_low:
        expected |= {
            f"vision_tower_low.{name}"
            for name, _ in tower.vision_tower_low.named_parameters()
            if "attn_pool" not in name  # in checkpoints, but not in the forward pass
        }
    assert trained == expected


@pytest.mark.parametrize(("low_size", "neck_size"), [(32, 16), (64, 32)])
def test_hybrid_resizes_the_neck_to_four_times_the_low_grid(low_size, neck_size):
    tower = small_hybrid(low={"image_size": low_size})
    resized = []
    tower.vision_tower_high.vision_tower.downsamples.register_forward_hook(
        lambda module, args, output: resized.append(args[0])
    )
    high, low = tower(images(64))
    assert resized[0].shape[-2:] == (neck_size, neck_size)
    assert high.shape == low.shape == (2, (low_size // 8) ** 2, 48)


@torch.no_grad()
def test_hybrid_gives_each_tower_its_size_of_the_image_with_its_own_normalisation():
    tower = small_hybrid(
        high={"pixel_mean": [0.48, 0.46, 0.41], "pixel_std": [0.27, 0.26, 0.28]},
        low={"pixel_mean": [0.5] * 3, "pixel_std": [0.4] * 3},
    )
    seen = {}
    for name in ("high", "low"):
        network = getattr(tower, f"vision_tower_{name}").vision_tower
        network.register_forward_hook(lambda module, args, output, name=name: seen.update({name: args[0]}))
    x = images(64)
    tower(x)
    mean, std = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])
    torch.testing.assert_close(seen["high"], (x - mean[:, None, None]) / std[:, None, None], rtol=0, atol=1e-6)
    # PIL's bilinear resize is antialiased.
    resized = np.stack(
        [
            [np.asarray(Image.fromarray(channel).resize((32, 32), Image.Resampling.BILINEAR)) for channel in image]
            for image in x.numpy()
        ]
    )
    torch.testing.assert_close(seen["low"], (torch.from_numpy(resized) - 0.5) / 0.4, rtol=0, atol=1e-5)


# --- weights files of a tower's own ---


def assert_same_weights(tower: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = tower.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name


def create_with_checkpoint(kind: str, path: Path) -> nn.Module:
    if kind == "siglip":
        return create_siglip_vit("siglip_large_patch16_384", ckpt_path=str(path), **SIGLIP)
    return create_sam_vit("sam_b_downsample", ckpt_path=str(path), **SAM)


@pytest.mark.parametrize("kind", ["siglip", "sam"])
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_ckpt_path_fills_the_tower(kind, suffix, tmp_path):
    expected = (small_siglip() if kind == "siglip" else small_sam()).state_dict()
    path = tmp_path / f"tower{suffix}"
    save_file(expected, path) if suffix == ".safetensors" else torch.save(expected, path)
    assert_same_weights(create_with_checkpoint(kind, path), expected)


@pytest.mark.parametrize("config", [LOW, {**HIGH, "neck_size": 16}], ids=["siglip", "sam"])
def test_ckpt_path_in_a_tower_s_config_fills_its_network(config, tmp_path):
    expected = randomized(CLIPVisionTower(**config)).vision_tower.state_dict()
    torch.save(expected, tmp_path / "tower.pth")
    assert_same_weights(CLIPVisionTower(**config, ckpt_path=str(tmp_path / "tower.pth")).vision_tower, expected)


def test_sam_ckpt_path_takes_segment_anything_s_own_files(tmp_path, caplog):
    """Segment Anything's files have an `image_encoder.` prefix, a mask decoder, and no second neck."""
    expected = small_sam().state_dict()
    published = {f"image_encoder.{k}": v for k, v in expected.items() if "hd" not in k and "downsamples" not in k}
    torch.save({**published, "mask_decoder.iou_token.weight": torch.zeros(1)}, tmp_path / "sam.pth")
    with caplog.at_level(logging.WARNING, "deepseek_vl"):
        loaded = create_with_checkpoint("sam", tmp_path / "sam.pth").state_dict()
    for name in published:
        assert torch.equal(loaded[name.removeprefix("image_encoder.")], published[name]), name
    assert "neck_hd.0.weight" in caplog.text
    assert "mask_decoder.iou_token.weight" in caplog.text


@pytest.mark.parametrize("kind", ["siglip", "sam"])
def test_a_missing_ckpt_path_is_an_error_that_names_it(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        create_with_checkpoint(kind, tmp_path / "absent.pth")


@pytest.mark.parametrize("kind", ["siglip", "sam"])
def test_a_ckpt_path_of_another_network_is_an_error_that_names_it(kind, tmp_path):
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"resnet\.pth"):
        create_with_checkpoint(kind, tmp_path / "resnet.pth")


@pytest.mark.parametrize("kind", ["siglip", "sam"])
def test_a_ckpt_path_of_another_size_is_an_error_that_names_the_parameter(kind, tmp_path):
    weights = (small_siglip() if kind == "siglip" else small_sam()).state_dict()
    weights["blocks.1.norm1.weight"] = torch.zeros(5)
    torch.save(weights, tmp_path / "tower.pth")
    with pytest.raises(ValueError, match=r"blocks\.1\.norm1\.weight.*\(5,\)"):
        create_with_checkpoint(kind, tmp_path / "tower.pth")


# --- what clients do with a tower ---

TOWERS = {
    "siglip": (lambda: CLIPVisionTower(**LOW, pixel_mean=[0.5] * 3, pixel_std=[0.5] * 3), 32),
    "sam": (lambda: CLIPVisionTower(**HIGH, neck_size=16), 64),
    "hybrid": (lambda: HybridVisionTower(HIGH, LOW, concat_type="sequence"), 64),
    "hybrid tuple": (lambda: HybridVisionTower(HIGH, LOW), 64),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:Warning")
@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_a_traced_tower_gives_the_same_output_on_other_images(kind):
    create, size = TOWERS[kind]
    tower = randomized(create())
    traced = torch.jit.trace(tower, images(size), check_trace=False)
    x = images(size, seed=7)
    torch.testing.assert_close(traced(x), tower(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", TOWERS)
def test_gradients_reach_the_pixels_that_an_output_depends_on(kind):
    create, size = TOWERS[kind]
    x = images(size).requires_grad_()
    output = randomized(create())(x)
    output = torch.cat(output, dim=1) if isinstance(output, tuple) else output
    output[0].pow(3).sum().backward()
    assert x.grad[0].isfinite().all()
    assert (x.grad[0] != 0).float().mean() > 0.99
    assert (x.grad[1] == 0).all()  # no gradient flows between images of a batch


@pytest.mark.parametrize(("grid", "batch"), [((6, 6), 2), ((3, 5), 1)])
def test_both_ways_of_adding_relative_positions_are_the_same_attention(grid, batch, monkeypatch):
    """A bias, for all heads and images at once or in parts, and widened queries and keys give the same attention."""
    height, width = grid
    torch.manual_seed(0)
    q, k, v = torch.randn(3, batch, 4, height * width, 8).unbind()
    rel_h = torch.randn(batch, 4, height * width, height)
    rel_w = torch.randn(batch, 4, height * width, width)
    widened = positions.attend_widened(q, k, v, rel_h, rel_w)
    torch.testing.assert_close(positions.attend_with_bias(q, k, v, rel_h, rel_w), widened)
    for heads_at_once in (7, 3, 1, 0):
        monkeypatch.setattr(positions, "MAX_BIAS_ELEMENTS", heads_at_once * (height * width) ** 2)
        torch.testing.assert_close(positions.attend_with_bias(q, k, v, rel_h, rel_w), widened)


class LargestBias(TorchDispatchMode):
    """Record the number of elements of the largest attention mask."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        mask = (kwargs or {}).get("attn_mask")
        if mask is not None:
            self.elements = max(self.elements, mask.numel())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [1, 9])
@torch.no_grad()
def test_many_images_have_no_more_bias_than_one(count, monkeypatch):
    monkeypatch.setattr(positions, "MAX_BIAS_ELEMENTS", 64**2)  # one head's bias
    tower = small_sam()
    with LargestBias() as bias:
        features = tower(images(64, count))
    assert bias.elements == 64**2
    torch.testing.assert_close(features[:1], tower(images(64, count)[:1]))


@pytest.mark.parametrize(
    ("concat_type", "shape"), [("feature", (1, 16, 96)), ("sequence", (1, 32, 48)), ("add", (1, 16, 48))]
)
def test_hybrid_of_two_siglip_towers(concat_type, shape):
    """The high tower need not be SAM."""
    low = dict(small_config("siglip", 100).vision_config.params)
    hybrid = HybridVisionTower({**low, "image_size": 64, "patch_size": 16}, low, concat_type=concat_type)
    assert hybrid(torch.rand(1, 3, 64, 64)).shape == shape


def test_an_unknown_key_of_the_hybrid_tower_is_an_error():
    low = dict(small_config("siglip", 100).vision_config.params)
    with pytest.raises(ValueError, match="'freeze_hihg'"):
        HybridVisionTower(low, low, freeze_hihg=True)
