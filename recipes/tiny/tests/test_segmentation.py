"""Segmentation maps of the toy world's pictures, and the training of a tower on them."""

import string

import numpy as np
import pytest
import torch
from PIL import Image

from deepseek_vl.models import VLMImageProcessor
from deepseek_vl.models.siglip_vit import create_siglip_vit
from recipes.tiny.segmentation import SegmentationCollator, SegmentationModel
from recipes.tiny.world import COLOURS, SegmentationMaps
from recipes.tiny.world.draw import draw
from recipes.tiny.world.maps import CHANNELS, COLOUR_NAMES, THINGS, draw_map, sample_grid
from recipes.tiny.world.scene import Chart, Picture, Shape, Word

WHITE = (255, 255, 255)


def names(values: np.ndarray) -> tuple[str, str, int]:
    return THINGS[values[0]], COLOUR_NAMES[values[1]], int(values[2])


def test_a_map_says_what_is_where() -> None:
    word = Word("Ab3", "blue", COLOURS["blue"][0], 100, 170, 120, 40, 0, font=0, card=None)
    star = Shape("star", "red", COLOURS["red"][0], 40, 50, 30, 0)
    ring = Shape("ring", "green", COLOURS["green"][0], 150, 50, 30, 0)
    picture = Picture(200, 220, (WHITE, WHITE), "plain", 0, shapes=(ring, star), words=(word,))
    image = draw_map(picture)
    assert image.size == (200, 220)
    values = np.asarray(image)
    assert names(values[50, 40]) == ("star", "red", 1)
    assert names(values[50, 124]) == ("ring", "green", 2)
    assert names(values[50, 150]) == ("", "", 0)  # the ring's hole
    spelt = [names(values[170, x]) for x in range(200) if values[170, x, 0]]
    assert list(dict.fromkeys(spelt)) == [("A", "blue", 1), ("b", "blue", 2), ("3", "blue", 3)]
    # The map covers everything that is drawn.
    assert (values[..., 0] > 0)[(np.asarray(draw(picture)) != 255).any(-1)].mean() > 0.99


def test_a_chart_s_map_numbers_the_bars_and_names_the_extremes() -> None:
    colours = ("red", "green", "blue")
    tones = tuple(COLOURS[name][0] for name in colours)
    chart = Chart(colours, tones, (0.4, 0.2, 0.9), (10, 10, 190, 110), 0.2, grid=False, frame=False, ink=(0, 0, 0))
    values = np.asarray(draw_map(Picture(200, 120, (WHITE, WHITE), "plain", 0, chart=chart)))
    found = [names(values[105, x]) for x in (40, 100, 160)]
    assert found == [("bar", "red", 1), ("shortest", "green", 2), ("tallest", "blue", 3)]


@pytest.mark.parametrize(
    ("size", "where"), [((90, 30), (slice(6, 12), slice(None))), ((30, 90), (slice(None), slice(6, 12)))]
)
def test_the_grid_follows_the_processor_s_padding(size: tuple[int, int], where: tuple[slice, slice]) -> None:
    """A picture that is all shape fills the same cells of the grid as its pixels after the processor's padding."""
    collator = SegmentationCollator(VLMImageProcessor(144, image_mean=(0.5,) * 3, image_std=(0.5,) * 3), 18)
    batch = collator([(Image.new("RGB", size, WHITE), Image.new("RGB", size, (1, 2, 3)))])
    assert batch["images"].shape == (1, 3, 144, 144)
    assert batch["cells"].shape == (1, 18, 18, 3)
    expected = torch.zeros(18, 18, 3, dtype=torch.int64)
    expected[where] = torch.tensor([1, 2, 3])
    assert torch.equal(batch["cells"][0], expected)
    white = batch["images"][0, 0, 4::8, 4::8] == 1
    assert torch.equal(white, expected[..., 0] > 0)


def test_maps_depend_on_seed_and_index_only_and_cover_everything() -> None:
    maps = SegmentationMaps(150, seed=2)
    for i in (0, 149):
        again = SegmentationMaps(1000, seed=2)[i]
        assert [image.tobytes() for image in maps[i]] == [image.tobytes() for image in again]
    assert SegmentationMaps(1, seed=3)[0][0].tobytes() != maps[0][0].tobytes()
    with pytest.raises(IndexError, match="no map 150 among 150"):
        maps[150]
    grids = torch.stack([sample_grid(image, 18) for _, image in maps])
    assert [len(channel.unique()) for channel in grids.unbind(-1)] == list(CHANNELS)
    assert {*string.ascii_letters, *string.digits} < set(THINGS)


@pytest.fixture
def segmenter() -> SegmentationModel:
    torch.manual_seed(0)
    tower = create_siglip_vit("siglip_large_patch16_384", image_size=48, select_layer=-1, width=64, layers=2, heads=2)
    return SegmentationModel(tower)


def test_the_loss_is_the_mean_over_cells_by_hand(segmenter: SegmentationModel) -> None:
    cells = torch.zeros(2, 6, 6, 3, dtype=torch.int64)
    cells[0, 1, 2] = torch.tensor([3, 2, 1])
    result = segmenter(torch.randn(2, 3, 48, 48), cells)
    logits = result["logits"]
    assert logits.shape == (2, 6, 6, sum(CHANNELS))
    things = logits[..., : CHANNELS[0]].log_softmax(-1)
    wanted = -things[0, 1, 2, 3]
    background = -(things[..., 0].sum() - things[0, 1, 2, 0])
    thing = (wanted + 0.2 * background) / (1 + 0.2 * 71)
    rest = logits[0, 1, 2, CHANNELS[0] :].split(CHANNELS[1:])
    expected = thing - (rest[0].log_softmax(-1)[2] + rest[1].log_softmax(-1)[1]) / 2
    torch.testing.assert_close(result["loss"], expected)
    nothing = segmenter(torch.randn(1, 3, 48, 48), torch.zeros(1, 6, 6, 3, dtype=torch.int64))
    assert nothing["loss"].isfinite()


def test_each_cell_is_answered_by_the_patch_it_lies_in(segmenter: SegmentationModel) -> None:
    images = torch.randn(1, 3, 48, 48)
    features = segmenter.tower(images)
    head = segmenter.head(features)[0]
    logits = segmenter(images)["logits"][0]
    for row in range(6):
        for column in range(6):
            own = head[(row // 2) * 3 + column // 2].view(2, 2, -1)[row % 2, column % 2]
            torch.testing.assert_close(logits[row, column], own)


def test_a_tower_learns_a_handful_of_maps(segmenter: SegmentationModel) -> None:
    collator = SegmentationCollator(VLMImageProcessor(48, image_mean=(0.5,) * 3, image_std=(0.5,) * 3), segmenter.side)
    maps = SegmentationMaps(8, seed=1)
    batch = collator([maps[i] for i in range(8)])
    optimizer = torch.optim.AdamW([p for p in segmenter.parameters() if p.requires_grad], 2e-3)
    for _ in range(150):
        loss = segmenter(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    predicted = segmenter(batch["images"])["logits"][..., : CHANNELS[0]].argmax(-1)
    assert (predicted == batch["cells"][..., 0]).float().mean() > 0.97
    assert all(parameter.grad is None for parameter in segmenter.tower.attn_pool.parameters())
